"""An LSTM that reads a handwritten digit row by row: eight steps of eight pixels.

The sequential reading of digits became a usual test of recurrent networks after Le et al. (2015), who read
MNIST pixel by pixel; the cell is that of the LSTM paper with the forget gate.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .figures import confusion_matrix, learning_curves
from .recipe import Metric, Recipe, register
from .settings import ImageSettings

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule


def data(settings: ImageSettings, folder: Path | None) -> "LightningDataModule":
    from .digits import DigitsData

    return DigitsData(settings.batch_size, shift=settings.shift, rows=True)


LSTM_DIGITS = register(
    Recipe(
        name="lstm_digits",
        title="An LSTM reads handwritten digits row by row",
        paper="Hochreiter, Schmidhuber. Long Short-Term Memory. Neural Computation 9(8), 1997.",
        model="lstm_digits",
        data=data,
        settings=ImageSettings(
            epochs=100,
            batch_size=64,
            learning_rate=1e-2,
            weight_decay=0.05,
            warmup_epochs=3,
            label_smoothing=0.1,
            gradient_clip=1.0,
            shift=1,
            threads=1,
        ),
        metric=Metric(
            name="test accuracy",
            key="accuracy",
            unit="%",
            bar=96.0,
            source="ours, set before the first run: plain torch.nn reached 96.9 in a trial",
        ),
        figures={"Learning curves": learning_curves, "Confusion matrix of the test": confusion_matrix},
        notes="The paper's own tasks are synthetic; reading digits by rows is a later custom.",
    )
)
