#!/usr/bin/env python
"""The same as `clover analyze`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
