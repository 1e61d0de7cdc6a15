#!/usr/bin/env python
"""The same as `clover prepare-data`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["prepare-data", *sys.argv[1:]]))
