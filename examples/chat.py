"""Stream a chat from a running server (`make serve`) with the unmodified openai client."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
messages = [{"role": "user", "content": "What is a list comprehension?"}]
for chunk in client.chat.completions.create(model="demo", messages=messages, temperature=0, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
