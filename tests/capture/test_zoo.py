"""Check capture on real models: the same outputs at other batches, the same training, inputs that are found."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.graph import Graph, TensorSpec, spec_of
from tests.capture.compare import assert_evaluates_like, assert_trains_like
from tests.zoo import ZOO, quiet

pytestmark = pytest.mark.zoo

# One of each kind that a capture could treat differently; tests/zoo captures all of the zoo.
REPRESENTATIVE = {
    "vgg16_bn": "batch norms and dropout of torch.nn",
    "mobilenetv3_large_100": "batch norms of timm's own class",
    "dm_nfnet_f0": "batch norms on weights, which are always in training mode",
    "vit_tiny_patch16_224": "fused attention",
    "coat_tiny": "modules that are shared between blocks",
    "swin_tiny_patch4_window7_224": "stochastic depth, buffers that no state_dict holds",
    "gpt2": "keyword inputs, tied embeddings, an output type of its own",
    "t5": "two inputs of different lengths, three names for one embedding",
    "mixtral": "operators of another library, regions without gradient",
    "detr": "a training mode that cannot be traced",
    "mamba": "writes in place",
}


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    """Capture a model whose library may warn."""
    with quiet():
        return capture(model, *args, **kwargs)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_zoo(name: str) -> None:
    model = ZOO[name].build()
    for part in model.modules():
        if hasattr(part, "drop_prob"):  # stochastic depth, which capture does not carry over and says so
            vars(part)["drop_prob"] = 0.0
    graph = captured(model, ZOO[name].inputs(batch=1))
    assert list(graph.module.state_dict()) == list(model.state_dict())
    assert not any("fixed at 1" in note for note in graph.notes)
    args, kwargs = ZOO[name].inputs(batch=1)
    assert [
        spec_of(node) for node in graph.nodes if node.op == "placeholder" and isinstance(spec_of(node), TensorSpec)
    ] == [
        TensorSpec(tuple(x.shape), x.dtype, (True, *(False,) * (x.dim() - 1)))
        for x in torch.utils._pytree.tree_leaves((args, kwargs))
        if isinstance(x, Tensor)
    ]
    with quiet():
        for batch in (1, 3):
            args, kwargs = ZOO[name].inputs(batch=batch)
            assert_evaluates_like(model, graph, *args, **kwargs)
        assert_trains_like(model, graph, *args, steps=1, **kwargs)


class TestTransformers:
    """Hugging Face models come with a cache, with dummy inputs and with outputs of their own types."""

    @staticmethod
    def llama(**options: Any) -> Any:
        """Build a small Llama with grouped queries."""
        import transformers

        sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options)
        with quiet():
            return transformers.LlamaForCausalLM(config)

    def test_cache_is_left_out_and_named(self) -> None:
        model = self.llama()
        ids = torch.randint(64, (1, 7))
        graph = captured(model, {"input_ids": ids}, dynamic={"input_ids": {1: "length"}})
        assert graph.notes == ["config.use_cache counts as False: the graph returns no key-value cache"]
        assert model.config.use_cache is True
        longer = torch.randint(64, (3, 11))
        with quiet():
            output = graph.module(input_ids=longer)
            expected = copy.deepcopy(model).eval()(input_ids=longer)
        assert type(output) is type(expected)
        assert torch.equal(output.logits, expected.logits)
        assert output.past_key_values is None

    def test_attention_dropout_is_carried(self) -> None:
        model = self.llama(attention_dropout=0.25)
        graph = captured(model, {"input_ids": torch.randint(64, (1, 7)), "use_cache": False})
        with quiet():
            assert_trains_like(model, graph, input_ids=torch.randint(64, (2, 7)), use_cache=False)

    def test_tied_embeddings_stay_tied(self) -> None:
        model = self.llama(tie_word_embeddings=True)
        graph = captured(model, {"input_ids": torch.randint(64, (1, 7))})
        assert len(graph.aliases) == 1
        head = graph.module.get_parameter("lm_head.weight")
        assert head is graph.module.get_parameter("model.embed_tokens.weight")

    def test_dummy_inputs_are_found(self) -> None:
        graph = captured(self.llama())
        assert list(graph.example_inputs[1]) == ["input_ids"]
        assert graph.module(input_ids=torch.randint(64, (4, 5))).logits.shape[0] == 4

    def test_image_inputs_are_found(self) -> None:
        import transformers

        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        with quiet():
            model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
        graph = captured(model)
        assert graph.example_inputs[1]["pixel_values"].shape == (1, 3, 32, 32)
        assert graph.module(pixel_values=torch.rand(5, 3, 32, 32)).logits.shape == (5, 2)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 224), ("vit_tiny_patch16_224", 96)])
def test_timm_inputs_are_found(name: str, size: int) -> None:
    import timm

    options: dict[str, Any] = {"img_size": size} if size != 224 else {}
    graph = captured(timm.create_model(name, in_chans=1, **options))
    assert graph.example_inputs[0][0].shape == (1, 1, size, size)
