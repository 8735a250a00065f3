from __future__ import annotations

from dit_accel.cli import main

main()
