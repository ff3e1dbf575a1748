"""Classifiers with the heads and forwards that people write; each is given to ``--teacher-arch forwards.py:NAME``.

``scores`` are the logits that a forward is about, of images (N, C, H, W); forwards return them in their own ways.
"""

# mypy: ignore-errors
# It is code as users write it.

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 -- as people write it
from torch import Tensor, nn


class Classifier(nn.Module):
    def __init__(self, num_classes: int = 5, in_channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)).mean((2, 3))

    def scores(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))

    def forward(self, x: Tensor) -> Any:
        return self.scores(x)


class OneLogit(Classifier):
    def __init__(self) -> None:
        super().__init__(1)


class NamedOneLogit(Classifier):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)


class SqueezedAxis(OneLogit):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).squeeze(1)


class SqueezedAll(OneLogit):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).squeeze()


class FlattenedLogit(OneLogit):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).view(-1)


class SigmoidLayer(OneLogit):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.scores(x))


class SigmoidFunction(OneLogit):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.scores(x)).squeeze()


class SigmoidOfATensor(OneLogit):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).sigmoid().view(-1, 1)


class SigmoidUsedTwice(OneLogit):
    """The same layer gates the features and ends the network."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def features(self, x: Tensor) -> Tensor:
        features = super().features(x)
        return features * self.sigmoid(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.scores(x))


class BothProbabilities(OneLogit):
    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.scores(x))
        return torch.cat([1 - p, p], 1)


class SigmoidPerClass(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.scores(x))


class SoftmaxLayer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.scores(x))


class SoftmaxFunction(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.scores(x), dim=-1)


class SoftmaxOfTwo(Classifier):
    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).softmax(1)


class LogSoftmaxFunction(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.scores(x), dim=1)


class LogSoftmaxLayer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential(self.fc, nn.LogSoftmax(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


class ExpOfLogSoftmax(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.scores(x), dim=1).exp()


class LogitsAndFeatures(Classifier):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.fc(features), features


class FeaturesAndLogits(Classifier):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return features, self.fc(features)


class LogitsAndNone(Classifier):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.scores(x), None


class LogitsAndProbabilities(Classifier):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.scores(x)
        return logits, F.softmax(logits, dim=1)


class LogitsAndAttention(Classifier):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.scores(x), (tokens @ tokens.transpose(1, 2)).softmax(-1)


class LogitsAndFeatureMaps(Classifier):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = self.conv(x)
        return self.fc(F.relu(maps).mean((2, 3))), [maps, F.max_pool2d(maps, 2)]


class LogitsAndReconstruction(Classifier):
    """A capsule network's outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x), torch.sigmoid(x)


class TwoClassifiers(Classifier):
    """Main and auxiliary classifier, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.fc(features), self.aux(features)


class AuxiliaryInTraining(TwoClassifiers):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else self.scores(x)


class DeepSupervision(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.features(x)
        return [self.early(features), self.early(features).relu(), self.fc(features)]


class LogitsInADict(Classifier):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"loss": None, "logits": self.scores(x), "hidden": self.features(x)}


class OutInADict(Classifier):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.scores(x)}


class OtherKeyInADict(Classifier):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"backbone": self.conv(x), "cls": self.scores(x)}


class TwoTasks(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.age = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        return {"age": self.age(features), "breed": self.fc(features)}


class NestedTasks(TwoTasks):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"heads": super().forward(x), "stage": 3}


class TasksInATuple(TwoTasks):
    def forward(self, x: Tensor) -> Any:
        return tuple(super().forward(x).values())


class ListOfOne(Classifier):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.scores(x)]


class Named(NamedTuple):
    hidden: Tensor
    prediction: Tensor


class NamedFields(Classifier):
    def forward(self, x: Tensor) -> Named:
        return Named(self.conv(x), self.scores(x))


@dataclass
class Output:
    loss: Tensor | None
    scores: Tensor
    maps: Tensor


class DataClass(Classifier):
    def forward(self, x: Tensor) -> Output:
        return Output(None, self.scores(x), self.conv(x))


class PlainObject(Classifier):
    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pred=self.scores(x), step=3)


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As transformers have it."""

    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self else super().__getattribute__(name)


class LibraryOutput(Classifier):
    def forward(self, pixel_values: Tensor | None = None, labels: Tensor | None = None) -> ModelOutput:
        assert pixel_values is not None
        return ModelOutput(logits=self.scores(pixel_values), hidden_states=(self.conv(pixel_values),))


class Conv1x1(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)[:, :, None, None]


class OneAxisBehind(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).unsqueeze(-1)


class OneAxisBefore(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).unsqueeze(1)


class Temperature(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def scores(self, x: Tensor) -> Tensor:
        return super().scores(x) / self.temperature


class Cosine(Classifier):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__(num_classes)
        self.weight = nn.Parameter(torch.randn(num_classes, 8))

    def scores(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.features(x)), F.normalize(self.weight))


class ArcFace(Cosine):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        cosine = self.scores(x)
        return cosine if labels is None else cosine - 0.5 * F.one_hot(labels, 5)


class LastLayerIsAnother(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.rotation = nn.Linear(8, 4)


class Wrapper(nn.Module):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.model = Classifier(num_classes)

    def scores(self, x: Tensor) -> Tensor:
        return self.model.scores(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([Classifier(), Classifier()])

    def scores(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


class FlagWithDefault(Classifier):
    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        return self.features(x) if return_features else self.scores(x)


class AnyArguments(Classifier):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.scores(x)


class MaskWithDefault(Classifier):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.scores(x if mask is None else x * mask)


# --------------------------------------------------------------------------------------------------------- images


class Grey(Classifier):
    def __init__(self) -> None:
        super().__init__(5, 1)


class FourChannels(Classifier):
    def __init__(self) -> None:
        super().__init__(5, 4)


class SixteenChannels(Classifier):
    def __init__(self) -> None:
        super().__init__(5, 16)


class ChannelsLast(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x.permute(0, 3, 1, 2))


class ChannelsLastInATuple(Classifier):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.scores(x.permute(0, 3, 1, 2)), None


class FlatVectors(nn.Module):
    """The training loop flattens the images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))

    def scores(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Rows(nn.Module):
    """An LSTM over the rows of grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 5)

    def scores(self, x: Tensor) -> Tensor:
        return self(x.squeeze(1))

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.fc(out[:, -1])


class NormalisesInside(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)

    def scores(self, x: Tensor) -> Tensor:
        return super().scores((x - self.mean) / 0.25)


class PixelsUpTo255(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_var.fill_(1e6)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))).mean((2, 3))


class SwapsChannels(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)

    def scores(self, x: Tensor) -> Tensor:
        return super().scores(x[:, [2, 1, 0]])


class Resizes(Classifier):
    def scores(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 32:
            x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
        return super().scores(x)


class ChecksShapes(Classifier):
    def scores(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        assert c == 3, "three channels"
        return super().scores(x.view(b, c, h, w))


class ViewOfTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 9 * 9, 5)

    def scores(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.conv(x).relu(), 1).reshape(x.size(0), -1)[:, : 4 * 81])

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv(x).relu(), 1)
        return self.fc(x.view(x.size(0), -1)[:, : 4 * 81])


class ViewOfANumber(ViewOfTheBatch):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()[:, :, :9, :9].contiguous()
        return self.fc(x.view(-1, 4 * 9 * 9))

    def scores(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu()[:, :, :9, :9].flatten(1))


class InPlace(Classifier):
    def scores(self, x: Tensor) -> Tensor:
        return super().scores(2 * (x - 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x *= 2
        return super().scores(x)


class Prints(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        print("input", x.shape)
        return self.scores(x)


class DropoutAlwaysOn(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(self.features(x), 0.5))


class RepeatsGrey(Classifier):
    def __init__(self) -> None:
        super().__init__()

    def scores(self, x: Tensor) -> Tensor:
        return super().scores(x.repeat(1, 3, 1, 1) if x.shape[1] == 1 else x)


class OwnDevice(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x.to(self.device))


class FrozenBackbone(Classifier):
    """Its features are computed without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.features(x)
        return self.fc(features)


class ForwardWithoutGradients(Classifier):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


class Wide(Classifier):
    """Logits of a wild scale, as where the weights see images of another range."""

    def scores(self, x: Tensor) -> Tensor:
        return 1e5 * super().scores(x)


# ------------------------------------------------------------------------------------------------------------ pixels


class Pixels(nn.Module):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3, padding=1)

    def scores(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Any:
        return self.scores(x)


class OneChannelOfPixels(Pixels):
    def __init__(self) -> None:
        super().__init__(1)


class SigmoidOfPixels(OneChannelOfPixels):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.scores(x))


class SoftmaxOfPixels(Pixels):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.scores(x), dim=1)


class PixelsAndALabel(Pixels):
    """segmentation-models-pytorch with a classifier beside the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        masks = self.scores(x)
        return masks, self.fc(masks.mean((2, 3)))


# ------------------------------------------------------------------------------------------- what cannot be a teacher


class Indices(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).argmax(1)


class SoftmaxOverTheBatch(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.scores(x), dim=0)


class Arrays(Classifier):
    def forward(self, x: Tensor) -> Any:
        return self.scores(x).detach().numpy()


class TwoImages(Classifier):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scores(x - y)


class Bytes(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        return self.scores(x.float() / 255)


class Nothing(Classifier):
    def forward(self, x: Tensor) -> None:
        self.scores(x)


class FeaturesAlone(Classifier):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x), F.max_pool2d(self.conv(x), 2)]
