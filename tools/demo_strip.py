"""The README's picture: captions in English and Chinese, and what the built-in model draws for them.

    python tools/demo_strip.py docs/demo.png --font NotoSansCJK-Regular.ttc

No combination of shape, colour and background here was ever seen in training. The font only labels the picture; it is
not part of the project (Noto Sans CJK, SIL Open Font License).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo_scenes import holds_out, parse
from PIL import Image, ImageDraw, ImageFont

from zimage_lite import GenerateOptions, load
from zimage_lite.checkpoint.model_card import DEMO, default_size, model_folder

CAPTIONS = (
    "a red circle on a cyan background",
    "a cyan star on a purple background",
    "a white cross on a green background",
    "蓝色背景上的黄色星形",
    "一幅画：黑色背景上的黄色圆环",
    "绿色背景上有红色菱形",
)
SIDE, GAP, LABEL, POINTS = 180, 12, 30, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--font", required=True, help="a font file with Chinese characters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    width, height = default_size(model_folder(DEMO))
    requests = [GenerateOptions(caption, width, height, seed=args.seed) for caption in CAPTIONS]
    images = load(DEMO, device="cpu").generate(requests)
    strip = Image.new("RGB", (len(CAPTIONS) * (SIDE + GAP) + GAP, SIDE + LABEL + GAP), "white")
    pen, face = ImageDraw.Draw(strip), ImageFont.truetype(args.font, POINTS)
    for n, (caption, image) in enumerate(zip(CAPTIONS, images, strict=True)):
        print(f"{'unseen' if holds_out(parse(caption)) else 'seen  '}  {caption}")
        left = GAP + n * (SIDE + GAP)
        strip.paste(Image.fromarray(image.numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, GAP))
        pen.text((left + SIDE / 2, GAP + SIDE + LABEL / 2), caption, fill="black", font=face, anchor="mm")
    strip.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
