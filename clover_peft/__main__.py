"""`python -m clover_peft` is the `clover` command."""

import sys

from clover_command import main

sys.exit(main())
