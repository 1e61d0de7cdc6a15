#!/usr/bin/env python
"""The same as `clover prune`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
