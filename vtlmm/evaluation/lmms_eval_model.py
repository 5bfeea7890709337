# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The model `vtlmm` of lmms-eval, registered by the entry point `lmms_eval.models`: `lmms-eval --model vtlmm`."""

from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from vtlmm.data.images import open_image
from vtlmm.inference.generation import generate
from vtlmm.inference.loading import load_model


class VTLMMForLmmsEval(lmms):
    r"""
    Answer as `vtlmm eval` does: greedily and in the model's chat template.

    Args:
        pretrained (`str`): folder or Hub id of a VT-LMM.
        batch_size (`int`, *optional*, defaults to 1)
        dtype, revision, trust_remote_code (*optional*): see [`load_model`].
        device, max_batch_size (*optional*): arguments that the harness passes to every model. They have no effect.

    Raises:
        `ValueError`: for a checkpoint with missing tensors, and for tasks that sample or have audio or video.
    """

    is_simple = False  # the harness passes messages, not a text with separate images

    def __init__(
        self,
        pretrained: str,
        batch_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.processor = load_model(
            pretrained, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list) -> list[str]:
        """Return the answers in the order of `requests`. A batch has questions of one task with its settings."""
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (requests[i].args[4], len(requests[i].args[0])))
        with tqdm(total=len(order), desc="answering") as progress:
            while order:
                batch = [i for i in order[: self.batch_size] if requests[i].args[4] == requests[order[0]].args[4]]
                order = order[len(batch) :]
                for i, text in zip(batch, self._answer([requests[i].args for i in batch]), strict=True):
                    answers[i] = text
                progress.update(len(batch))
        return answers

    def _answer(self, batch: list[tuple]) -> list[str]:
        _, _, settings, _, task, _ = batch[0]
        if settings.get("do_sample") or settings.get("temperature") or settings.get("num_beams", 1) > 1:
            raise ValueError(
                f"Task {task} samples or searches ({settings}). VT-LMM answers greedily: change it with --gen_kwargs."
            )
        conversations = [
            [{**message, "content": [_part(part, task) for part in message["content"]]} for message in messages(doc)]
            for messages, doc in ((args[1], self.task_dict[args[4]][args[5]][args[3]]) for args in batch)
        ]
        texts = generate(
            self.model,
            self.processor,
            conversations,
            max_new_tokens=settings.get("max_new_tokens", 128),
            batch_size=len(conversations),
        )
        for stop in settings.get("until") or []:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts

    def loglikelihood(self, requests):
        raise NotImplementedError("This model answers questions only. Use lm-eval for log-likelihoods of texts.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("This model answers single questions only.")


def _part(part: dict, task: str) -> dict:
    """Return a part of a message for the chat template, with its image in RGB as in training."""
    if part["type"] == "text":
        return part
    if part["type"] != "image" or not hasattr(part["url"], "convert"):
        raise ValueError(
            f"Task {task} has a {part['type']} ({part['url']!r:.60}). VT-LMM supports images from PIL only."
        )
    return {"type": "image", "image": open_image(part["url"])}
