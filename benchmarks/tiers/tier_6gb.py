"""The 6 GB tier: the same as `zimage-lite bench --tier 6gb`, and takes the same options.

python benchmarks/tiers/tier_6gb.py --out benchmarks/results/NAME.json
"""

import sys

from zimage_lite.cli import main

if __name__ == "__main__":
    main(["bench", "--tier", "6gb", *sys.argv[1:]])
