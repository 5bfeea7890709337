# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure time, peak memory and error of the fused losses, and compare them with other implementations.

    PYTHONPATH=. python benchmarks/visual_loss.py --json visual_loss.json

Four comparisons: the visual loss where the VM head learns (stage III) and where the decoder learns (stage IV), the
whole loss of stage IV (text + visual), and the pseudo image features. Forward and backward, on random data.

Each implementation runs once per round. Each round starts with a different implementation. A ratio is the median over
the rounds of the ratio within a round, with minimum and maximum in brackets, so slow phases of the machine cancel.
Peak memory includes the gradients but not the inputs. Errors are relative to float64 with the same rounded inputs,
‖value − exact‖ / ‖exact‖.
"""

import argparse
import importlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from loss_products import (
    pseudo_feature_products,
    pseudo_feature_products_in_chunks,
    visual_loss_products,
    visual_loss_products_in_chunks,
)
from measuring import machine, milliseconds, peak_bytes, ratio

from modeling_vtlmm.fused_losses_vtlmm import (
    fused_language_loss_sum,
    fused_pseudo_image_features,
    fused_visual_loss_sum,
)
from modeling_vtlmm.losses_vtlmm import language_loss_sum, pseudo_image_features, visual_loss_sum
from vtlmm.data.markdown import markdown_table


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STAGES = {"visual_head": "III", "joint": "IV"}
# A sequence has a system prompt, an image of CLIP-L/336, a question and an answer. The answer is the language target.
PROMPT_TOKENS, IMAGE_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 35, 576, 25, 100
SEQUENCE_TOKENS = PROMPT_TOKENS + IMAGE_TOKENS + QUESTION_TOKENS + ANSWER_TOKENS
PLAIN, OURS, PRODUCTS = "masked, plain autograd", "ours", "matrix products alone"
CHUNKED = "matrix products of ours, in chunks"
DEFINITION = "our definition, plain autograd"
NAMED = "masked, plain autograd, logits named"


@dataclass
class Comparison:
    """Implementations of one function. Each returns its value and gradients in the order of `names`."""

    title: str
    names: tuple[str, ...]
    implementations: dict[str, Callable[[], list[torch.Tensor]]]
    exact: Callable[[], list[torch.Tensor]]
    results: dict[str, dict] = field(default_factory=dict)  # by implementation, filled by `measure`


class Data:
    """Hidden states and image features of sequences, the rows that the losses select, and both heads."""

    def __init__(self, arguments):
        if arguments.rows % IMAGE_TOKENS:
            raise ValueError(f"--rows {arguments.rows} is not a multiple of the {IMAGE_TOKENS} tokens of an image.")
        self.device, self.dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
        self.num_rows, hidden_size, self.vocab_size = arguments.rows, arguments.hidden_size, arguments.vocab_size
        batch_size = arguments.rows // IMAGE_TOKENS
        torch.manual_seed(0)
        self.hidden_states = self.normal(batch_size, SEQUENCE_TOKENS, hidden_size)
        self.inputs_embeds = self.normal(batch_size, SEQUENCE_TOKENS, hidden_size)
        # The logits get a standard deviation of 2.
        self.lm_weight = self.normal(self.vocab_size, hidden_size, scale=2 / hidden_size**0.5)
        self.vm_weight = self.normal(self.vocab_size, hidden_size, scale=2 / hidden_size**0.5)
        self.embeddings = self.normal(self.vocab_size, hidden_size)
        self.upstream = self.normal(self.num_rows, hidden_size)

        self.labels = torch.randint(self.vocab_size, (batch_size, SEQUENCE_TOKENS), device=self.device)
        self.labels[:, :-ANSWER_TOKENS] = -100
        self.image_token_mask = torch.zeros_like(self.labels, dtype=torch.bool)
        self.image_token_mask[:, PROMPT_TOKENS : PROMPT_TOKENS + IMAGE_TOKENS] = True
        # A hidden state predicts the position to its right.
        self.predicts_patch, self.predicts_word = self.image_token_mask[:, 1:], self.labels[:, 1:] != -100
        self.patch_states = self.hidden_states[:, :-1][self.predicts_patch]
        self.image_features = self.inputs_embeds[:, 1:][self.predicts_patch]
        self.words = self.labels[:, 1:][self.predicts_word]

    def normal(self, *shape, scale=1.0):
        return torch.randn(*shape, device=self.device).mul_(scale).to(self.dtype)


def step(function, inputs, upstream=None, learn=None):
    """Return a function without arguments that runs forward and backward and returns the value and gradients."""
    learn = learn or [True] * len(inputs)

    def run():
        leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(inputs, learn, strict=True)]
        value = function(*leaves)
        value.backward(upstream)
        return [value.detach(), *(leaf.grad for leaf, needed in zip(leaves, learn, strict=True) if needed)]

    return run


def masked_loss_sum(student, student_weight, teacher, teacher_weight):
    """Compute the loss in the simplest way: select the patches, detach the target, call kl_div."""
    with torch.no_grad():
        target = F.linear(teacher, teacher_weight).float().softmax(-1)
    return F.kl_div(F.linear(student, student_weight).float().log_softmax(-1), target, reduction="sum")


def named_loss_sum(student, student_weight, teacher, teacher_weight):
    """Compute the same with both logits in variables, which stay in memory until the end of the forward."""
    student_logits = F.linear(student, student_weight).float()
    with torch.no_grad():
        teacher_logits = F.linear(teacher, teacher_weight).float()
    return F.kl_div(student_logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="sum")


def released_loss(data, stage, with_text=False, upcast=False):
    """
    Return the released formulation, which computes both heads for the whole sequence, shifts and copies the logits,
    and then selects the image tokens. The dtype of the softmax is the dtype of the logits. The target is not detached,
    so in stage IV the image features get a gradient too.
    """
    joint = stage == "joint"
    inputs = data.hidden_states, data.inputs_embeds, data.lm_weight, data.vm_weight
    learn = [joint, joint, joint, not joint]

    def loss(hidden_states, inputs_embeds, lm_weight, vm_weight):
        visual_logits, logits = F.linear(inputs_embeds, vm_weight), F.linear(hidden_states, lm_weight)
        if upcast:
            visual_logits, logits = visual_logits.float(), logits.float()
        shift_logits, shift_visual = logits[..., :-1, :].contiguous(), visual_logits[..., 1:, :].contiguous()
        mask = data.image_token_mask[..., 1:].contiguous()
        student, teacher = shift_logits[mask], shift_visual[mask]
        if not joint:
            student, teacher = teacher, student
        value = torch.nn.KLDivLoss(reduction="batchmean")(F.log_softmax(student, -1), F.softmax(teacher, -1))
        if with_text:
            value = value + F.cross_entropy(shift_logits.flatten(0, 1), data.labels[:, 1:].flatten())
        return value

    def run():
        value, *gradients = step(loss, inputs, learn=learn)()
        if not joint:
            return [value, *gradients]
        grad_states, _, grad_weight = gradients
        grad_states = grad_states if with_text else grad_states[:, :-1][data.predicts_patch]
        return [value, grad_weight, grad_states]

    return run


def add_released(implementations, data, stage, with_text=False):
    implementations["released formulation"] = released_loss(data, stage, with_text)
    if data.dtype != torch.float32:
        implementations["released formulation, float32 softmax"] = released_loss(data, stage, with_text, upcast=True)


def compare_visual_loss(data, stage):
    image, text = (data.image_features, data.vm_weight), (data.patch_states, data.lm_weight)
    (student, weight), (teacher, teacher_weight) = (image, text) if stage == "visual_head" else (text, image)
    joint = stage == "joint"

    def weight_first(function):
        # Both stages need dW. Only stage IV needs dX.
        inputs = (weight, student) if joint else (weight,)
        return step(lambda w, x=student: function(x, w) / data.num_rows, inputs)

    inputs = student, weight, teacher, teacher_weight, joint
    implementations = {
        PRODUCTS: lambda: visual_loss_products(*inputs),
        CHUNKED: lambda: visual_loss_products_in_chunks(*inputs),
        PLAIN: weight_first(lambda x, w: masked_loss_sum(x, w, teacher, teacher_weight)),
        NAMED: weight_first(lambda x, w: named_loss_sum(x, w, teacher, teacher_weight)),
        DEFINITION: weight_first(lambda x, w: visual_loss_sum(x, w, teacher, teacher_weight)),
        OURS: weight_first(lambda x, w: fused_visual_loss_sum(x, w, teacher, teacher_weight)),
    }
    add_released(implementations, data, stage)
    if trl := optional("trl.kernels.chunked_divergence", "TRL chunked divergence"):
        divergence = trl.ChunkedDivergenceFunction.apply
        implementations["TRL chunked divergence"] = weight_first(
            lambda x, w: divergence(x, w, None, teacher, teacher_weight, None, 0.0)[0].sum()
        )
    if data.device.type != "cuda":
        print("Skipped: Liger fused JSD (its kernels need a GPU)")
    elif liger := optional("liger_kernel.transformers", "Liger fused JSD"):
        jsd = liger.LigerFusedLinearJSD(jsd_beta=0.0)  # 0 is KL(teacher ‖ student), a mean over the rows
        implementations["Liger fused JSD"] = weight_first(
            lambda x, w: jsd(x, w, teacher, teacher_weight, None) * data.num_rows
        )
    names = ("loss", "dW", "dX") if joint else ("loss", "dW")
    title = f"Visual loss, stage {STAGES[stage]}"
    return Comparison(title, names, implementations, lambda: exact_losses(data, stage)[: len(names)])


def compare_stage_iv_loss(data):
    """Compare the sum of text and visual loss, with gradients of `lm_head` and of the hidden states of sequences."""
    num_words = data.words.numel()

    def both(language_loss, visual_loss):
        def loss(weight, hidden_states):
            left = hidden_states[:, :-1]
            lm_loss = language_loss(left[data.predicts_word], weight, data.words)
            vm_loss = visual_loss(left[data.predicts_patch], weight, data.image_features, data.vm_weight)
            return lm_loss / num_words + vm_loss / data.num_rows

        return step(loss, (data.lm_weight, data.hidden_states))

    word_states = data.hidden_states[:, :-1][data.predicts_word]

    def products():
        for states, teach in ((word_states, False), (data.patch_states, True)):
            logits = torch.mm(states, data.lm_weight.t())
            if teach:
                torch.mm(data.image_features, data.vm_weight.t())
            torch.mm(logits, data.lm_weight)
            torch.mm(logits.t(), states)

    implementations = {
        PRODUCTS: products,
        PLAIN: both(language_loss_sum, masked_loss_sum),
        OURS: both(fused_language_loss_sum, fused_visual_loss_sum),
    }
    add_released(implementations, data, "joint", with_text=True)
    title, names = "Text + visual loss, stage IV", ("loss", "dW", "dX")
    return Comparison(title, names, implementations, lambda: exact_losses(data, "joint", with_text=True))


def compare_pseudo_image_features(data):
    inputs = data.vm_weight, data.image_features, data.embeddings

    def implementation(function):
        return step(lambda weight, features, embeddings: function(features, weight, embeddings), inputs, data.upstream)

    def exact():
        weight, features, embeddings = (tensor.double().requires_grad_() for tensor in inputs)
        values = []
        for rows, upstream in zip(features.split(256), data.upstream.double().split(256), strict=True):
            values.append(pseudo_image_features(rows, weight, embeddings))
            values[-1].backward(upstream)
            values[-1] = values[-1].detach()
        return [torch.cat(values), weight.grad, features.grad, embeddings.grad]

    tensors = data.image_features, data.vm_weight, data.embeddings
    implementations = {
        PRODUCTS: lambda: pseudo_feature_products(*tensors),
        CHUNKED: lambda: pseudo_feature_products_in_chunks(*tensors),
        PLAIN: implementation(pseudo_image_features),
        OURS: implementation(fused_pseudo_image_features),
    }
    return Comparison("Pseudo image features", ("value", "dW", "dX", "dE"), implementations, exact)


def exact_losses(data, stage, with_text=False):
    """Return loss, dW and dX in float64 from plain autograd, in chunks of rows."""
    heads = {"visual_head": (data.image_features, data.vm_weight), "joint": (data.patch_states, data.lm_weight)}
    features, weight = (tensor.double() for tensor in heads.pop(stage))
    ((teacher, teacher_weight),) = heads.values()
    features, weight, teacher_weight = features.requires_grad_(), weight.requires_grad_(), teacher_weight.double()
    total = 0.0
    for rows, teacher_rows in zip(features.split(256), teacher.split(256), strict=True):
        loss = visual_loss_sum(rows, weight, teacher_rows.double(), teacher_weight) / data.num_rows
        loss.backward()
        total += loss.detach()
    if not with_text:
        return [total, weight.grad, features.grad]
    states = data.hidden_states[:, :-1][data.predicts_word].double().requires_grad_()
    loss = language_loss_sum(states, weight, data.words) / data.words.numel()
    loss.backward()
    gradient = torch.zeros_like(data.hidden_states, dtype=torch.float64)
    gradient[:, :-1][data.predicts_patch] = features.grad
    gradient[:, :-1][data.predicts_word] = states.grad
    return [total + loss.detach(), weight.grad, gradient]


def optional(module, name):
    try:
        return importlib.import_module(module)
    except Exception as error:  # imports of these libraries raise different errors
        print(f"Skipped: {name} ({type(error).__name__}: {error})")
        return None


def measure(comparison, device, rounds):
    """Measure error and peak memory in one call each, and then the time in interleaved rounds."""
    exact = comparison.exact()
    for name, function in list(comparison.implementations.items()):
        result = comparison.results[name] = {"milliseconds": []}
        try:
            outputs = function()
            result["peak_bytes"] = peak_bytes(function, device)
        except Exception as error:  # e.g. out of memory or a changed interface
            print(f"Skipped: {name} ({type(error).__name__}: {str(error)[:200]})")
            del comparison.implementations[name], comparison.results[name]
            continue
        if outputs is not None:
            result["errors"] = {
                part: ((a.double() - b).norm() / b.norm()).item()
                for part, a, b in zip(comparison.names, outputs, exact, strict=True)
            }
        del outputs
    del exact
    names = list(comparison.implementations)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            comparison.results[name]["milliseconds"].append(milliseconds(comparison.implementations[name], device))


def table(comparison):
    """Return a markdown table, and add the ratios to the results."""
    results = comparison.results
    header = ["implementation", "ms", "time / plain", "time / products", "share of products", "peak GB"]
    header += ["peak / plain", f"error of {', '.join(comparison.names)}"]
    rows = []
    for name, result in results.items():
        cells = [name, f"{statistics.median(result['milliseconds']):.1f}"]
        for key, reference in (("time_to_plain", PLAIN), ("time_to_products", PRODUCTS)):
            result[key] = ratio(result["milliseconds"], results[reference]["milliseconds"])
            cells.append("{median:.2f} ({min:.2f}–{max:.2f})".format(**result[key]))
        result["share_of_products"] = 1 / result["time_to_products"]["median"]
        cells.append(f"{result['share_of_products']:.0%}")
        if name in (PRODUCTS, CHUNKED):
            cells += ["–", "–", "–"]
        else:
            result["peak_to_plain"] = result["peak_bytes"] / results[PLAIN]["peak_bytes"]
            cells += [f"{result['peak_bytes'] / 1e9:.3f}", f"{result['peak_to_plain']:.2f}"]
            cells.append(", ".join(f"{error:.1e}" for error in result["errors"].values()))
        rows.append(cells)
    return f"### {comparison.title}\n\n{markdown_table(header, rows)}"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="cpu: float32, cuda: bfloat16")
    parser.add_argument("--rows", type=int, help=f"image tokens, a multiple of {IMAGE_TOKENS} (cpu: 1152, cuda: 9216)")
    parser.add_argument("--hidden-size", type=int, help="cpu: 1024, cuda: 4096")
    parser.add_argument("--vocab-size", type=int, default=32000, help="words")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="visual_head: III, joint: IV")
    parser.add_argument("--rounds", type=int, help="cpu: 5, cuda: 20")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (1: measure CPU time)")
    parser.add_argument("--short", action="store_true", help="only ours, plain autograd and the matrix products")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    defaults = {"dtype": "float32", "rows": 1152, "hidden_size": 1024, "rounds": 5}
    if arguments.device == "cuda":
        defaults = {"dtype": "bfloat16", "rows": 9216, "hidden_size": 4096, "rounds": 20}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    data = Data(arguments)
    where = machine(data.device)
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    print(
        f"{arguments.rows} rows, hidden size {arguments.hidden_size}, {arguments.vocab_size} words, {arguments.dtype}"
    )

    comparisons = [compare_visual_loss(data, stage) for stage in arguments.stage]
    if "joint" in arguments.stage:
        comparisons.append(compare_stage_iv_loss(data))
    comparisons.append(compare_pseudo_image_features(data))
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    report = {"machine": where, "arguments": settings, "comparisons": {}}
    for comparison in comparisons:
        if arguments.short:
            kept = comparison.implementations.keys() & {PRODUCTS, CHUNKED, PLAIN, OURS}
            comparison.implementations = {k: v for k, v in comparison.implementations.items() if k in kept}
        measure(comparison, data.device, arguments.rounds)
        print(f"\n{table(comparison)}", flush=True)
        report["comparisons"][comparison.title] = comparison.results
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
