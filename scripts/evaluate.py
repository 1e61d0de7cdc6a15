#!/usr/bin/env python
"""The same as `clover evaluate`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
