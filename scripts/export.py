#!/usr/bin/env python
"""The same as `clover export`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
