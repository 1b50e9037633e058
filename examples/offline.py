"""Complete a batch of prompts in this process."""

from kvbuffer import LLM, SamplingParams

llm = LLM("demo")
params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=60)
for output in llm.generate(["A dictionary is", "To read a file,", "The zip function"], params):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
