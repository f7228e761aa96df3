"""Layer types guessed from names and shapes, beside what the models say themselves."""

import pytest
from torch import nn

from purepruning_interop import torch as interop
from purepruning_interop.checkpoints import guess_layers


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTM(8, 4), nn.GRU(8, 4, 2), nn.RNN(8, 4)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.deconv = nn.ConvTranspose2d(8, 4, 2)
        self.signal, self.volume = nn.Conv1d(4, 6, 3), nn.Conv3d(2, 4, 3)
        self.embed_tokens, self.fc = nn.Embedding(11, 8), nn.Linear(8, 5)
        self.norm, self.rms, self.act = nn.LayerNorm(8), nn.RMSNorm(8), nn.PReLU()
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize("model", [Cells(), Mixed()], ids=["cells", "mixed"])
def test_torch_models_are_guessed_as_their_adapter_reads_them(model):
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    guessed = {x.weight: x for x in guess_layers(shapes)}
    for layer in interop.layers(model):
        found = guessed.pop(layer.weight)
        kind = "BatchNorm" if layer.type == "BatchNorm2d" else layer.type
        assert (found.type, found.out_axes, found.in_axes, found.bias) == (
            kind,
            layer.out_axes,
            layer.in_axes,
            layer.bias,
        )
    assert guessed == {}


def test_flax_layouts():
    shapes = {
        "params/Conv_0/kernel": (3, 3, 1, 8),
        "params/BatchNorm_0/scale": (8,),
        "params/BatchNorm_0/bias": (8,),
        "batch_stats/BatchNorm_0/mean": (8,),
        "params/Embed_0/embedding": (11, 8),
        "params/query/kernel": (8, 2, 4),
        "params/out/kernel": (2, 4, 8),
        "params/Dense_0/kernel": (8, 5),
        "params/Dense_0/bias": (5,),
    }
    found = {x.weight.split("/")[1]: x for x in guess_layers(shapes)}
    axes = {name: (x.type, x.out_axes, x.in_axes) for name, x in found.items()}
    assert axes == {
        "Conv_0": ("Conv2d", (3,), (2,)),
        "BatchNorm_0": ("BatchNorm", (0,), ()),
        "Embed_0": ("Embedding", (1,), (0,)),
        "query": ("Linear", (1, 2), (0,)),
        "out": ("Linear", (2,), (0, 1)),
        "Dense_0": ("Linear", (1,), (0,)),
    }
    assert found["Dense_0"].bias == "params/Dense_0/bias"


def test_gpt2_matrices_are_input_first_square_ones_too():
    shapes = {"h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,)}
    assert guess_layers(shapes)[0].in_axes == (1,)
    shapes |= {"h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,)}
    assert [x.in_axes for x in guess_layers(shapes)] == [(0,), (0,)]


def test_experts_are_stacked():
    (found,) = guess_layers({"layers.0.mlp.experts.gate_up_proj": (4, 16, 8)})
    assert (found.stack_axes, found.out_axes, found.in_axes) == ((0,), (1,), (2,))


def test_names_without_a_collection_select_too():
    (found,) = guess_layers({"params.fc.kernel": (4, 3)})
    assert found.names == ("params.fc", "fc")


def test_what_is_no_weight_is_no_layer():
    assert guess_layers({"running_mean": (4,), "inv_freq": (4,), "step": ()}) == ()
