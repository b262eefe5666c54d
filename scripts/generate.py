"""Generate text with a model: a run, a checkpoint, an export, or any transformers folder.

python scripts/generate.py runs/llama_tiny-sltrain --prompt "def "
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.checkpoint.loading import Loaded, load
from lrtrain.config.stored import add_trust
from lrtrain.core.streams import never_fail_to_print
from lrtrain.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="RUN|PATH", help="a run, a checkpoint, or a folder with a model")
    parser.add_argument("--prompt", default="", help="the beginning of the text")
    parser.add_argument("--tokens", type=int, default=100, help="largest number of new tokens; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy; default: %(default)s")
    parser.add_argument("--samples", type=int, default=1, help="number of texts; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of sampling; default: %(default)s")
    add_trust(parser)
    args = parser.parse_args()
    try:
        loaded = load(args.path, "cuda" if torch.cuda.is_available() else "cpu", None, args.trust)
    except ConfigError as error:
        sys.exit(str(error))
    tokenizer = loaded.tokenizer
    front = front_of(loaded)
    ids = [*front, *tokenizer.encode(args.prompt, add_special_tokens=False)]
    torch.manual_seed(args.seed)
    found = loaded.model.generate(  # pyright: ignore[reportCallIssue]
        torch.tensor([ids], device=loaded.model.device).expand(args.samples, -1),
        max_new_tokens=args.tokens,
        pad_token_id=tokenizer.eos_token_id,
        **({"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}),
    )
    print("\n---\n".join(tokenizer.batch_decode(found[:, len(front) :], skip_special_tokens=True)))


def front_of(loaded: Loaded) -> list[int]:
    """The ids at the start of a text, as in training: BOS if the tokenizer adds it; otherwise, and for lrtrain runs
    (whose BOS is not used in training), EOS, which separates documents; or nothing."""
    tokenizer = loaded.tokenizer
    bos = tokenizer.bos_token_id
    start = bos if loaded.run is None and bos in tokenizer.encode("") else tokenizer.eos_token_id
    return [] if start is None else [start]  # pyright: ignore[reportReturnType]  (what transformers allows, not an id)


if __name__ == "__main__":
    never_fail_to_print()
    main()
