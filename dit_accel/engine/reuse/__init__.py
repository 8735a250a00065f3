"""Ways to serve what an earlier step computed, one file each."""
