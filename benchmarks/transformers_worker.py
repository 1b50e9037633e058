"""Batched greedy decoding with transformers, driven over stdin and stdout (one JSON object per line).

transformers has no batching HTTP server that accepts linear-attention models (`generate_batch` refuses them), so it is
given its best case instead: a bare loop over the model's forward with a DynamicCache and prompts of equal length,
without HTTP, scheduling, detokenising or padding. It is also the referee: with `--dtype float32` it scores what the
other systems wrote.

    {"do": "generate", "prompts": [[...], ...], "max_tokens": 64}  -> {"token_ids": [[...], ...], "times": [...]}
    {"do": "score", "prompts": [...], "outputs": [...]}             -> {"regret": [[...], ...], "margin": [[...], ...]}

`times` are seconds from the start of the call to the end of each step; they hold for every request of the batch.
`regret` is how many nats below the best next token each given token is, and `margin` the distance between the best two.
"""

import argparse
import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def generate(model, prompts, max_tokens):
    start = time.perf_counter()
    ids = torch.tensor(prompts)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    steps, times = [], []
    while True:
        ids = out.logits[:, -1:].argmax(-1)
        steps.append(ids)
        times.append(time.perf_counter() - start)
        if len(steps) == max_tokens:
            return {"token_ids": torch.cat(steps, 1).tolist(), "times": times}
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)


def score(model, prompts, outputs):
    answer = {"regret": [], "margin": []}
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = model(input_ids=torch.tensor([prompt + output]), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1].float()  # the rows that predict the output's tokens
        best = logits.topk(2, dim=-1).values
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        answer["regret"].append((best[:, 0] - chosen).tolist())
        answer["margin"].append((best[:, 0] - best[:, 1]).tolist())
    return answer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing but replies on stdout
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            reply = {"generate": generate, "score": score}[request.pop("do")](model, **request)
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
