"""The 8 GB tier: the same as `zimage-lite bench --tier 8gb`, and takes the same options.

python benchmarks/tiers/tier_8gb.py --out benchmarks/results/NAME.json
"""

import sys

from zimage_lite.cli import main

if __name__ == "__main__":
    main(["bench", "--tier", "8gb", *sys.argv[1:]])
