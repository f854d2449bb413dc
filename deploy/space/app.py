"""minigpt as a Hugging Face Space: the web page at / with its model at /model/, OpenAI's API at /v1.

The same as `minigpt serve --host 0.0.0.0 --port 7860`, on the port that a Space shows. MINIGPT_API_KEY, if set, is what
clients and visitors have to know. PORT chooses another port (for a try at home).
"""
import os

from minigpt import create_app
from minigpt.engine.api_schema import Limits
from minigpt.engine.serving import serve

app = create_app(api_key=os.environ.get("MINIGPT_API_KEY") or None,
                 limits=Limits(max_batch=4, max_queue=16, max_tokens=512, timeout=120))

if __name__ == "__main__":
    serve(app, os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", 7860)))
