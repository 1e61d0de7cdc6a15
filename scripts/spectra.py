#!/usr/bin/env python
"""The same as `clover spectra`."""

import sys

from clover_command import main

if __name__ == "__main__":
    sys.exit(main(["spectra", *sys.argv[1:]]))
