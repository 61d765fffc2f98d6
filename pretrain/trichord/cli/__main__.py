"""`python -m trichord.cli`."""

import sys

from trichord.cli import main

sys.exit(main())
