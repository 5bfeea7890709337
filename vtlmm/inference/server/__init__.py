# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Serve one loaded model with a part of OpenAI's API.

The path of a request:

1. `app.py:build_app`: the routes. `access.py:Access` checks host name, API key and content type before.
2. `chat.py:ChatCompletions.answer`: reads the body and sends the reply.
3. `preparation.py`: checks all fields (`schema.py`), reads the images (`request_images.py`) and encodes the prompt.
4. `vtlmm/inference/scheduler.py:Scheduler`: one thread with the model and the running batch.
5. `vtlmm/inference/decoding_batch.py:start_batch`: the call of `model.generate` for new prompts, which join the batch.
"""
