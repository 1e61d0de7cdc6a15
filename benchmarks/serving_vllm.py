"""Runs one model in vLLM, in an environment of its own that has no clover_peft, for `serving.py`.

    python serving_vllm.py question.json answer.json

The question names the model's folder, prompts as token ids, the number of new tokens, arguments of `vllm.LLM`, and
LoRAs by name. The answer has, for the model or for each LoRA and for each prompt, the greedy new tokens, and the
log-probabilities of the last tokens of prompt and continuation: of all but the first without LoRAs, and of the new
tokens with them, because vLLM's CPU build fails at those of a prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    question = json.loads(Path(sys.argv[1]).read_text())
    loras = question["loras"]
    more = {"enable_lora": True, "max_lora_rank": question["lora_rank"], "max_loras": len(loras)} if loras else {}
    model = LLM(model=question["folder"], dtype="float32", enforce_eager=True, **more, **question["arguments"])
    sampling = SamplingParams(
        temperature=0,
        max_tokens=question["new_tokens"],
        logprobs=0,
        prompt_logprobs=None if loras else 0,
        ignore_eos=True,
    )
    answer: dict[str, list[dict[str, list]]] = {}
    for number, (name, folder) in enumerate((loras or {"": ""}).items(), start=1):
        request = LoRARequest(name, number, folder) if folder else None
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in question["prompts"]]
        answer[name] = []
        for ids, output in zip(
            question["prompts"], model.generate(prompts, sampling, lora_request=request), strict=True
        ):
            new = output.outputs[0]
            places = [*(output.prompt_logprobs or [])[1:], *new.logprobs]
            tokens = [*ids, *new.token_ids][-len(places) :]
            logprobs = [place[token].logprob for token, place in zip(tokens, places, strict=True)]
            answer[name].append({"tokens": list(new.token_ids), "logprobs": logprobs})
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
