# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Run transformers' common tests for vision-language models and processors on the classes of VT-LMM.

The tests are not in the installed package. Set `TRANSFORMERS_TESTS` to a checkout of transformers at the tag of the
installed version (see CONTRIBUTING.md). A comment gives the reason of each changed test.
"""

import os
import sys
import unittest

import pytest
from helpers.tiny_models import build_processor
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.auto import modeling_auto

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMModel, VTLMMPreTrainedModel, VTLMMProcessor
from vtlmm.hub.chat_templates import load_template


pytestmark = pytest.mark.slow

if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("TRANSFORMERS_TESTS is not set to a checkout of transformers", allow_module_level=True)
sys.path.insert(0, os.environ["TRANSFORMERS_TESTS"])

from tests import test_processing_common, vlm_tester  # noqa: E402


class VTLMMModelTester(vlm_tester.VLMModelTester):
    base_model_class = VTLMMModel
    config_class = VTLMMConfig
    text_config_class = LlamaConfig
    vision_config_class = CLIPVisionConfig
    conditional_generation_class = VTLMMForConditionalGeneration


class VTLMMModelTest(vlm_tester.VLMModelTest, unittest.TestCase):
    model_tester_class = VTLMMModelTester
    # The language loss gives no gradient to the VM head and (as in llava) to the layer norm after the tower.
    test_all_params_have_gradient = False

    @pytest.fixture(autouse=True)
    def list_our_classes(self, monkeypatch):
        """The tests select the inputs of a class, such as labels, by its name in transformers' model mappings."""
        for names, model_class in (
            (modeling_auto.MODEL_MAPPING_NAMES, VTLMMModel),
            (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, VTLMMForConditionalGeneration),
        ):
            monkeypatch.setitem(names, VTLMMConfig.model_type, model_class.__name__)

    def test_can_init_all_missing_weights(self):
        # For remote code, transformers skips modules without direct parameters, such as CLIP's attention. Their linear
        # layers keep the default standard deviation of 0.02. This package cannot change that.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VTLMMPreTrainedModel, "is_custom_code", lambda *args: False)
            super().test_can_init_all_missing_weights()


class VTLMMProcessorTest(test_processing_common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VTLMMProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return build_processor().tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return build_processor().image_processor

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 14, "num_additional_image_tokens": 1, "chat_template": load_template("vicuna_v1")}

    @pytest.fixture(autouse=True)
    def own_image(self, monkeypatch, tmp_path):
        """Replace the images of these tests, which are on the Hub, by a local file."""
        path = str(tmp_path / "image.png")
        Image.new("RGB", (40, 30), "teal").save(path)
        monkeypatch.setattr(test_processing_common, "url_to_local_path", lambda url: path)
        monkeypatch.setitem(test_processing_common.MODALITY_INPUT_DATA, "images", [path, path])
