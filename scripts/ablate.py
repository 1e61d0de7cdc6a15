#!/usr/bin/env python
"""The same as `clover ablate`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
