"""Sinks and callbacks with the real packages; what is not installed is skipped, and says so."""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.monitor.oracle import chain
from tnconv.monitor import Monitor, NormTest, configuration
from tnconv.monitor.events import Alert, Event, event_of
from tnconv.monitor.sinks import MLflow, TensorBoard, Trackio, WandB, deliver


def event(step: int = 3) -> Event:
    histogram = {"hist": np.array([1, 2, 0]), "edges": np.linspace(-1, 1, 4)}
    made = event_of(step, {"Loss": 0.5, "GradNorm": [3.0, 4.0], "Hist": histogram}, ["a", "b"])
    made.alerts.append(Alert("warning", "dead units", "half of them"))
    return made


def test_event() -> None:
    found = event()
    assert found.scalars == {"Loss": 0.5, "GradNorm/a": 3, "GradNorm/b": 4, "GradNorm/total": 5}
    assert found.histograms["Hist"][0].tolist() == [1, 2, 0]


def test_functions_get_scalars_and_failures_are_left_out(caplog: Any) -> None:
    told: list[tuple[dict[str, float], int]] = []

    def broken(scalars: dict[str, float], step: int) -> None:
        raise ConnectionError("no network")

    def sink(scalars: dict[str, float], step: int) -> None:
        told.append((scalars, step))

    model, loss_fn = chain(), nn.CrossEntropyLoss()
    monitor = Monitor(model, loss_fn, ["Loss", "GradNorm"], sinks=[broken, sink])
    x, y = torch.randn(6, 2, 4, 4), torch.randint(3, (6,))
    x[0, 0, 0, 0] = torch.nan
    with caplog.at_level(logging.WARNING, "tnconv.monitor"):
        with pytest.warns(UserWarning, match="sink broken raised and is left out"):
            for _ in range(2):
                with monitor.step():
                    model.zero_grad()
                    loss_fn(model(x), y).backward()
    assert [step for _, step in told] == [0, 1] and "GradNorm/total" in told[0][0]
    assert "gradient is not finite" in caplog.text and "'0.weight'" in caplog.text
    assert len(monitor.alerts) == 1


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    assert not deliver([sink], event())
    sink.writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    (scalar,) = found.Scalars("GradNorm/total")
    assert (scalar.step, scalar.value) == (3, 5.0)
    (histogram,) = found.Histograms("Hist")
    assert histogram.histogram_value.num == 3
    assert list(histogram.histogram_value.bucket) == [1, 2, 0]


def test_wandb(tmp_path: Path, monkeypatch: Any) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = wandb.init(mode="disabled", dir=str(tmp_path))
    assert not deliver([WandB(run)], event())
    run.finish()


def test_trackio(monkeypatch: Any) -> None:
    """Its own histogram class, and calls that a stand-in for the server records."""
    trackio = pytest.importorskip("trackio")
    told: list[Any] = []

    class Module:
        Histogram, AlertLevel = trackio.Histogram, trackio.AlertLevel
        log = staticmethod(lambda found, step: told.append((found, step)))
        alert = staticmethod(lambda title, text, level: told.append((title, level)))

    assert not deliver([Trackio(Module)], event())
    assert told[0][1] == 3 and told[0][0]["Loss"] == 0.5
    assert told[1] == ("dead units", trackio.AlertLevel.WARN)


def test_mlflow(tmp_path: Path, monkeypatch: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}")
    mlflow.set_experiment("training")  # a folder that exists has no experiment of MLflow's own
    odd = Event(4, {"Own <x>$é": 1.0, "a//b/../c:d": math.nan, "..": 1e308})
    odd.alerts.append(Alert("info", "odd: <t>\n/x", 6000 * "t"))
    with mlflow.start_run() as run:
        assert not deliver([MLflow()], event())
        assert not deliver([MLflow()], odd)
    client = mlflow.MlflowClient()
    (metric,) = client.get_metric_history(run.info.run_id, "GradNorm/total")
    assert (metric.step, metric.value) == (3, 5.0)


@pytest.fixture
def without_images() -> Iterator[None]:
    """What frameworks would import for images is not needed, and may not fit this torch."""
    with patch.dict(sys.modules, {"torchvision": None}):
        yield


def declare_operators_of_images() -> None:
    """A torchvision that was built for another torch asks for them when it is imported."""
    for name, schema in (
        ("nms", "(Tensor a, Tensor b, float c) -> Tensor"),
        ("qnms", "(Tensor a, Tensor b, float c) -> Tensor"),
        ("roi_align", "(Tensor a, Tensor b, float c, SymInt d, SymInt e, int f, bool g) -> Tensor"),
    ):
        with suppress(RuntimeError):
            torch.library.define(f"torchvision::{name}", schema)


def test_lightning(tmp_path: Path) -> None:
    """The same records as in a loop, with accumulation, clipping, and a state."""
    declare_operators_of_images()
    lightning = pytest.importorskip("lightning.pytorch")
    from tnconv.monitor.lightning_callback import lightning_callback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.loss_fn = chain(), nn.CrossEntropyLoss()

        def training_step(self, batch: tuple[Tensor, Tensor], at: int) -> Tensor:
            found: Tensor = self.loss_fn(self.net(batch[0]), batch[1])
            return found

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    torch.manual_seed(1)
    data = [(torch.randn(2, 4, 4), torch.randint(3, ())) for _ in range(24)]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    callback = lightning_callback("net", "loss_fn", quantities=configuration("business"))
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.01,
        callbacks=[callback],
        logger=lightning.loggers.CSVLogger(str(tmp_path)),
        accelerator="cpu",
        default_root_dir=str(tmp_path),
        **settings,
    )
    trainer.fit(module := Module(), loader)
    records = callback.monitor.records
    assert len(records) == 3 and not list(module.net._forward_hooks)
    torch.manual_seed(0)
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    monitor = Monitor(model, loss_fn, configuration("business"))
    batches = list(loader)
    for at in range(0, 6, 2):
        with monitor.step():
            optimizer.zero_grad()
            for x, y in batches[at : at + 2]:
                (loss_fn(model(x), y) / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    for found, expected in zip(records, monitor.records, strict=True):
        assert found.keys() == expected.keys()
        for name in ("Loss", "NormTest", "TICDiag"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3)
        assert found["GradNorm"] == pytest.approx(expected["GradNorm"], rel=1e-3)
    assert max(records[0]["GradNorm"]) > 0.01  # before clipping
    assert callback.state_dict()["steps"] == 3


@pytest.mark.usefixtures("without_images")
def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tnconv.monitor.transformers_callback import transformers_callback

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    words = torch.randint(11, (8, 6))
    data = [{"input_ids": row, "labels": row} for row in words]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    callback = transformers_callback(quantities=[NormTest(), "Loss", "GradNorm"])
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    records = callback.monitor.records
    assert len(records) == 2
    assert all(r["Loss"] > 0 and r["NormTest"] > 0 for r in records)
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    for line, record in zip(logged, records, strict=True):
        total = sum(x**2 for x in record["GradNorm"]) ** 0.5
        assert line["grad_norm"] == pytest.approx(total, rel=1e-3)
