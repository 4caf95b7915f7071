"""`python -m timm_nrpm.cli`, which is the command `timm-nrpm`."""

import sys

from timm_nrpm.cli.program import main

sys.exit(main())
