"""python -m zimage_lite"""

from .cli import main

main()
