"""minigpt as a Hugging Face Space: the chat page at /, OpenAI's API at /v1.

The same as `minigpt serve --host 0.0.0.0 --port 7860`, on the port that a Space shows. MINIGPT_API_KEY, if set, is what
clients and visitors have to know. PORT chooses another port (for a try at home).
"""
import os

from minigpt.chat import ChatSession
from minigpt.engine.hub import load_pair
from minigpt.server import Limits, create_app, serve
from minigpt.ui import gradio_app, page_style

pair = load_pair()
page = gradio_app(ChatSession(*pair), uploads=False, visitors=16)
app = create_app(*pair, api_key=os.environ.get("MINIGPT_API_KEY") or None, ui=page, ui_style=page_style(),
                 limits=Limits(max_batch=4, max_queue=16, max_tokens=512, timeout=120, max_upload=0))

if __name__ == "__main__":
    serve(app, os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", 7860)))
