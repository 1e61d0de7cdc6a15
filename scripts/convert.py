#!/usr/bin/env python
"""The same as `clover convert`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
