#!/usr/bin/env python
"""The same as `clover plan`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
