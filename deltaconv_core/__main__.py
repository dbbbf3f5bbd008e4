"""Entry point of `python -m deltaconv_core`."""

import sys
from io import TextIOWrapper

from .cli import main

if isinstance(sys.stdout, TextIOWrapper):  # a console may lack letters that a file holds
    sys.stdout.reconfigure(errors="replace")
sys.exit(main())
