# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The measurements of `gpu.py`. Each row is one function, which runs in a separate process."""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import serving
import step
import torch
import visual_loss
from measuring import machine, milliseconds, ratio
from PIL import Image
from step_models import SHAPES, build_model, build_processor

from vtlmm.data.markdown import markdown_table
from vtlmm.data.output_files import write_json


RECIPE = Path(__file__).parents[1] / "recipes" / "qlora_24gb.yaml"
QUESTION = "What is in the image?"
LIMIT_24GB = 24e9


def namespace(arguments, **others):
    """Return the arguments that `step.py` and `visual_loss.py` expect."""
    tiny = arguments.shape == "tiny"
    defaults = {
        "device": arguments.device,
        "shape": arguments.shape,
        "dtype": "float32" if tiny else "bfloat16",
        "threads": torch.get_num_threads(),
        "data": ["llava"],
        "data_folder": str(arguments.parts / "data"),
        "optim": "adamw_torch_fused",
        "rounds": 1,
        "steps": 2 if tiny else 4,
        "rows": 8 if tiny else 64,
    }
    return argparse.Namespace(**{**defaults, **others})


# ---- Losses ----


def losses(compare, *options):
    def run(arguments):
        sizes = {"rows": 9216, "hidden_size": 4096, "vocab_size": 32000, "rounds": 20}
        if arguments.shape == "tiny":
            sizes = {"rows": 576, "hidden_size": 64, "vocab_size": 512, "rounds": 1}
        data = visual_loss.Data(namespace(arguments, **sizes))
        comparison = compare(data, *options)
        visual_loss.measure(comparison, data.device, sizes["rounds"])
        table = visual_loss.table(comparison).partition("\n\n")[2]
        return {"inputs": sizes, "results": comparison.results}, table

    return run


# ---- Optimizer steps ----


def steps(stage, names=(step.OURS,), adapter=None, optimizer=None, **settings):
    def run(arguments):
        # The state of AdamW for all weights of a 7B model would not fit on the GPU.
        optim = optimizer if arguments.device == "cuda" and optimizer else "adamw_torch_fused"
        results, [table] = step.compare_steps(stage, namespace(arguments, optim=optim), names, adapter, settings)
        if settings.get("per_device_train_batch_size") and arguments.device == "cuda":
            for result in results.values():
                result["fits_24_gb"] = max(result["peak_bytes"]) <= LIMIT_24GB
            fits = [f"{name}: {'yes' if result['fits_24_gb'] else 'no'}" for name, result in results.items()]
            table += f"\n\nWithin 24 GB: {', '.join(fits)}."
        return {"optimizer": optim, "results": results}, table

    return run


def batches(arguments):
    results, [table] = step.compare_batches("llava", namespace(arguments, optim="sgd"))
    return {"results": results}, table


# ---- Generation and server ----


def random_images(number, side):
    pixels = np.random.default_rng(0).integers(0, 256, (number, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def random_model(kind, arguments):
    """Return a model with random weights, whose answers do not end early, and its processor."""
    shape = SHAPES[arguments.shape]
    texts = {"messages": [[{"content": [{"text": f"{QUESTION} It is a photograph of a boat."}]}]]}
    processor = build_processor(kind, texts, shape)
    model = build_model(kind, processor, shape, namespace(arguments)).eval()
    tokenizer = processor.tokenizer
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The tokenizer has fewer words than the model. Special tokens would end the answer.
    model.generation_config.suppress_tokens = [*tokenizer.all_special_ids, *range(len(tokenizer), shape["vocab_size"])]
    return model, processor


def generation(arguments):
    """Measure the tokens per second of both models in interleaved rounds, with the prefill."""
    tiny = arguments.shape == "tiny"
    number, rounds = (4, 1) if tiny else (128, 3)
    models = {
        "LlavaForConditionalGeneration": random_model("llava", arguments),
        "ours": random_model("vtlmm", arguments),
    }
    results, table = {}, []
    for batch_size in (1, 16):
        seconds: dict = {name: [] for name in models}
        images = random_images(batch_size, SHAPES[arguments.shape]["vision"]["image_size"])
        for round_number in range(rounds + 1):
            for name, (model, processor) in models.items():
                user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
                text = processor.apply_chat_template([user], add_generation_prompt=True)
                inputs = processor(text=[text] * batch_size, images=images, return_tensors="pt")
                inputs = inputs.to(model.device, model.dtype)

                def run(model=model, inputs=inputs):
                    output = model.generate(**inputs, max_new_tokens=number, min_new_tokens=number, do_sample=False)
                    assert output.shape[1] == inputs["input_ids"].shape[1] + number

                duration = milliseconds(run, model.device) / 1e3
                if round_number:  # the first round is a warm-up
                    seconds[name].append(duration)
        llava, ours = seconds.values()
        speed = ratio(llava, ours)
        rates = [batch_size * number / statistics.median(values) for values in (llava, ours)]
        results[batch_size] = {
            "seconds": seconds,
            "tokens_per_s": dict(zip(models, rates, strict=True)),
            "speed": speed,
        }
        table.append([batch_size, *(f"{rate:.1f}" for rate in rates), step.interval(speed)])
    header = ["batch", *(f"{name}, tokens/s" for name in models), "speed / Llava"]
    return {"new_tokens": number, "results": results}, markdown_table(header, table)


def server(arguments):
    """Measure `vtlmm serve` with a model of random weights."""
    tiny = arguments.shape == "tiny"
    clients, number = ([1, 4], 20) if tiny else ([1, 16, 64], 128)
    with tempfile.TemporaryDirectory(dir=arguments.output) as name:
        folder = Path(name)
        for part in random_model("vtlmm", arguments):
            part.save_pretrained(folder / "model")
        del part
        torch.cuda.empty_cache()
        rows = []
        for image in random_images(32, SHAPES[arguments.shape]["vision"]["image_size"]):
            file = io.BytesIO()
            image.save(file, "PNG")
            rows += [{"images": [{"bytes": file.getvalue()}], "questions": [QUESTION]}] * 4
        parquet.write_table(pa.Table.from_pylist(rows), folder / "held_out.parquet")
        model = (folder / "model").resolve()
        bodies = serving.request_bodies(folder, str(model))
        with serving.running_server(serving.ROOT, model, torch.get_num_threads()) as (_, port):
            results = serving.compare({"new": port}, bodies, clients, number, 1)
    return {"requests": number, "results": results}, serving.table(results)


# ---- A real training ----


def real_qlora(arguments):
    """Compose SmolLM2-135M and DINOv2-S, align the model, and train stages III and IV with QLoRA."""
    from vtlmm import align_captions, compose_model, load_rows
    from vtlmm.train.recipe import read_recipe
    from vtlmm.train.stage_runner import train_stages

    max_steps, batch_size = (2, 2) if arguments.shape == "tiny" else (60, 8)
    on_gpu = arguments.device == "cuda"
    data = arguments.parts / "data/llava_pretrain_2k"
    with tempfile.TemporaryDirectory(dir=arguments.output) as name:
        folder = Path(name)
        model, processor = compose_model(
            str(arguments.parts / "weights/dinov2_small"), arguments.decoder, dtype="float32", drop_system_prompt=True
        )
        rows = load_rows(str(data / "chat.json"), image_folder=str(data / "images"))
        align_captions(model.to(arguments.device), processor, rows)
        for part in (model, processor):
            part.save_pretrained(folder / "start")
        del model, part
        settings = read_recipe(
            RECIPE,
            model_name_or_path=str(folder / "start"),
            dataset_name=str(data / "chat.json"),
            image_folder=str(data / "images"),
            output_dir=str(folder / "run"),
            stages={"visual_head": {}, "joint": {}},
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            optim="paged_adamw_8bit" if on_gpu else "adamw_torch_fused",
            dtype="bfloat16" if on_gpu else "float32",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            dataloader_num_workers=2 if on_gpu else 0,
            logging_steps=1,
            save_steps=max_steps,
            report_to="none",
            disable_tqdm=True,
        )
        settings.pop("stage", None)
        start = time.perf_counter()
        train_stages(settings)
        seconds = time.perf_counter() - start
        logs = {stage: logged_losses(folder / "run" / stage) for stage in settings["stages"]}
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    header = ["stage", "steps", "L_lm, first", "L_lm, last", "L_vm, first", "L_vm, last"]
    table = []
    for stage, entries in logs.items():
        cells = [f"{entries[i][key]:.4f}" if key in entries[i] else "–" for key in LOSSES for i in (0, -1)]
        table.append([stage, len(entries), *cells])
    about = f"{seconds:.1f} s for both stages" + (f", peak {peak / 1e9:.2f} GB" if on_gpu else "")
    return {"seconds": seconds, "peak_bytes": peak, "logs": logs}, f"{markdown_table(header, table)}\n\n{about}."


LOSSES = ("lm_loss", "visual_loss")


def logged_losses(folder):
    """Return the losses of each step of a finished stage."""
    [path] = folder.glob("checkpoint-*/trainer_state.json")
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return [{key: entry[key] for key in LOSSES if key in entry} for entry in history if "loss" in entry]


# ---- The list ----


LORA, QLORA = {"use_peft": True}, {"use_peft": True, "load_in_4bit": True}
CHECKPOINTED = {"gradient_checkpointing": True}
IN_24GB = {**CHECKPOINTED, "per_device_train_batch_size": 4}
FUNCTIONS = {
    "loss_iii": losses(visual_loss.compare_visual_loss, "visual_head"),
    "loss_iv": losses(visual_loss.compare_visual_loss, "joint"),
    "loss_iv_with_text": losses(visual_loss.compare_stage_iv_loss),
    "pseudo": losses(visual_loss.compare_pseudo_image_features),
    "step_iii": steps("visual_head", optimizer="sgd", **CHECKPOINTED),
    "step_iv": steps("joint", optimizer="sgd", **CHECKPOINTED),
    "step_lora": steps("joint", adapter=LORA, **CHECKPOINTED),
    "step_qlora": steps("joint", adapter=QLORA, optimizer="paged_adamw_8bit", **IN_24GB),
    "generation": generation,
    "server": server,
    "real_qlora": real_qlora,
    "batches": batches,
    "step_lora_kept": steps("joint", adapter=LORA, gradient_checkpointing=False),
}


def main():
    """Measure one row and write its record. `gpu.py` runs this as `gpu_rows.py NAME ARGUMENTS RECORD`."""
    name, text, record = sys.argv[1:]
    arguments = argparse.Namespace(**json.loads(text))
    arguments.parts, arguments.output = Path(arguments.parts), Path(arguments.output)
    torch.set_num_threads(arguments.threads)
    where = machine(arguments.device)
    values, table = FUNCTIONS[name](arguments)
    write_json(record, {"status": "done", "machine": where, **values, "table": table})


if __name__ == "__main__":
    main()
