#!/usr/bin/env python
"""The same as `clover sft`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
