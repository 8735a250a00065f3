"""How a grid is cut into tiles and blocks, and which blocks see which."""
