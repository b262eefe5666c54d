"""Let a model go on with a text: a run, one of its checkpoints, an export, or any transformers folder.

python scripts/generate.py runs/llama_tiny-sltrain --prompt "def "
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lrtrain.errors import ConfigError
from lrtrain.loading import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="RUN|PATH", help="a run, a checkpoint, or a folder with a model")
    parser.add_argument("--prompt", default="", help="how the text begins")
    parser.add_argument("--tokens", type=int, default=100, help="how many at the most; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest; default: %(default)s")
    parser.add_argument("--samples", type=int, default=1, help="how many texts; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    args = parser.parse_args()
    try:
        loaded = load(args.path, "cuda" if torch.cuda.is_available() else "cpu")
    except ConfigError as error:
        sys.exit(str(error))
    tokenizer = loaded.tokenizer
    ids = [tokenizer.eos_token_id, *tokenizer.encode(args.prompt, add_special_tokens=False)]  # EOS divides documents
    torch.manual_seed(args.seed)
    found = loaded.model.generate(  # pyright: ignore[reportCallIssue]
        torch.tensor([ids], device=loaded.model.device).expand(args.samples, -1),
        max_new_tokens=args.tokens,
        pad_token_id=tokenizer.eos_token_id,
        **({"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}),
    )
    print("\n---\n".join(tokenizer.batch_decode(found[:, 1:], skip_special_tokens=True)))


if __name__ == "__main__":
    main()
