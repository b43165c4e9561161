"""One model on several ranks: tensor parallel, or the members of CQIL groups on a rank each.

    cpullm run --nproc 2 tutorials/ranks.py MODEL                        tensor parallel
    cpullm run --nproc 2 tutorials/ranks.py MODEL --plan plan.json       CQIL; cqil.search(..).to_json() makes it
    cpullm run --nproc 4 tutorials/ranks.py MODEL --plan plan.json --tp-size 2      both: a member for every two ranks
    torchrun --nproc-per-node 2 tutorials/ranks.py MODEL                 the same, bound to nothing, with one thread

MODEL is a .gguf file or a directory of Hugging Face. Rank 0 generates; the others repeat its decoder's calls.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from torch_cpullm import cqil, distributed, runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plan", type=Path, help="JSON of a CQIL plan")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share a member of a group of the plan")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=32)
    parser.add_argument("--sample", type=int, metavar="SEED", help="sample, from this seed")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    loaded = runner.load_int4(runner.find_model(args.model, "MODEL"))
    model = loaded.model
    if args.plan is None:
        cqil.restore(model)  # a saved model may bring a plan
        distributed.shard_tensors(model)
    else:
        cqil.apply(model, cqil.Plan.from_json(args.plan.read_text()))
        distributed.shard_groups(model, tp_size=args.tp_size)

    distributed.follow(model)  # ranks above 0 stay here until rank 0 leaves
    if dist.get_rank() == 0:
        inputs = runner.encode(loaded.tokenizer, args.prompt, chat=False)
        before = distributed.traffic(model)
        if args.sample is not None:
            torch.manual_seed(args.sample)
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=args.sample is not None)
        print(loaded.tokenizer.decode(out[0], skip_special_tokens=True))
        new = out.shape[1] - inputs["input_ids"].shape[1]
        sums, sent = (after - start for after, start in zip(distributed.traffic(model), before, strict=True))
        print(f"\n{sums / new:.1f} all-reduces and {sent / new / 1024:.1f} KiB per token, prompt included")
        distributed.leave(model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
