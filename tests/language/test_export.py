from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPTNeoXForCausalLM

from lightning_halos import HuggingFaceCheckpoint
from lightning_halos.callbacks.hugging_face import describe_optimizer
from lightning_halos.cli import main
from lightning_halos.language.export import export_checkpoint, model_card
from lightning_halos.language.models import find_language_model, find_tokenizer
from tests.language.models import TASKS, VOCABULARY, LanguageModule, config, loader

TOKENS = torch.arange(3 * 32).reshape(3, 32) % VOCABULARY


def save(module: pl.LightningModule, folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> Path:
    """Trains a little and saves a checkpoint."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, enable_model_summary=False, callbacks=list(callbacks), **quiet, **kwargs
    )
    trainer.fit(module, loader())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return result


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_exported_model_computes_what_the_trained_one_does(tmp_path: Path, tied: bool) -> None:
    module = LanguageModule(tied)
    checkpoint = save(module, tmp_path, HuggingFaceCheckpoint())
    loaded = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, tmp_path / "out"))
    assert type(loaded) is GPTNeoXForCausalLM
    assert torch.equal(logits(loaded), logits(module.lm))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


def test_a_checkpoint_with_weights_only_can_be_exported(tmp_path: Path) -> None:
    module = LanguageModule()
    saving = ModelCheckpoint(tmp_path, "weights", save_weights_only=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[saving, HuggingFaceCheckpoint()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader())
    assert "on_save_checkpoint" not in vars(module)
    loaded = AutoModelForCausalLM.from_pretrained(export_checkpoint(tmp_path / "weights.ckpt", tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(module.lm))


def test_a_module_has_its_own_hook_again_after_a_fit_that_fails(tmp_path: Path) -> None:
    module = LanguageModule()
    own = vars(module)["on_save_checkpoint"] = lambda checkpoint: None
    module.on_train_start = lambda: 1 / 0  # type: ignore[method-assign, assign, return-value]
    with pytest.raises(ZeroDivisionError):
        save(module, tmp_path, HuggingFaceCheckpoint())
    assert vars(module)["on_save_checkpoint"] is own


def test_a_tokenizers_folder_may_be_a_path_object(tokenizer: str) -> None:
    found = find_tokenizer(Path(tokenizer))
    assert found is not None
    assert len(found) == len(AutoTokenizer.from_pretrained(tokenizer))


def test_the_folder_has_everything_that_a_model_on_the_hub_has(tmp_path: Path, tokenizer: str) -> None:
    module = LanguageModule()
    module.lm.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5)
    checkpoint = save(module, tmp_path, HuggingFaceCheckpoint(tokenizer), gradient_clip_val=0.25)
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        assert torch.equal(weights.get_tensor("gpt_neox.embed_in.weight"), module.lm.gpt_neox.embed_in.weight)
    text = "def main() -> None:"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(tokenizer)(text)
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.max_new_tokens, generation.do_sample, generation.temperature) == (7, True, 0.5)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for row in (
        "| Architecture | GPTNeoXForCausalLM |",
        "| Global steps | 2 |",
        "| Gradient clipping | 0.25 |",
        "| Optimizer | AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01",
    ):
        assert row in card


def test_the_card_has_the_settings_of_each_group_of_parameters() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "weight_decay": decay} for decay in (0.1, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    described = describe_optimizer(optimizer)
    assert described.startswith("AdamW(lr=0.5, betas=(0.9, 0.999), eps=1e-08, weight_decay=[0.1, 0.0]")


def test_the_card_has_the_task_of_the_kind_of_model() -> None:
    assert "\npipeline_tag: text-generation\ntags:" in model_card("GPTNeoXForCausalLM", 9, {})
    assert "\npipeline_tag: fill-mask\ntags:" in model_card("ModernBertForMaskedLM", 9, {})
    assert "pipeline_tag" not in model_card("ViTForImageClassification", 9, {})


def test_a_tokenizer_that_does_not_exist_is_missed_before_the_training(tmp_path: Path) -> None:
    module = LanguageModule()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="nowhere"):
        save(module, tmp_path, HuggingFaceCheckpoint(str(tmp_path / "nowhere")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_adapters_alone_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = LanguageModule()
    module.lm = get_peft_model(module.lm, LoraConfig(r=2, target_modules=["query_key_value"]))
    checkpoint = str(save(module, tmp_path, HuggingFaceCheckpoint()))
    evaluating = ["evaluate", checkpoint, "--tasks", "local_lambada", "--include-path", str(TASKS)]
    for command in (["export", checkpoint, str(tmp_path / "out")], evaluating):
        assert main(command) == 2
        assert "contains adapters of peft, not a complete model. Save the merged model" in capsys.readouterr().err


def test_the_checkpoint_stays_one_that_needs_no_pickled_code(tmp_path: Path, tokenizer: str) -> None:
    checkpoint = save(LanguageModule(), tmp_path, HuggingFaceCheckpoint(tokenizer))
    contents = torch.load(checkpoint, weights_only=True)
    assert contents["hugging_face"]["submodule"] == "lm"
    assert "tokenizer.json" in contents["hugging_face"]["tokenizer_files"]


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    module = LanguageModule()
    checkpoint = save(module, tmp_path, HuggingFaceCheckpoint(), precision="bf16-true")
    loaded = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, tmp_path / "out"), dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, module.lm.state_dict()[name].bfloat16())


def test_names_that_compiling_changes_are_put_right(tmp_path: Path) -> None:
    module = LanguageModule()
    expected = logits(module.lm)
    module.lm = torch.compile(module.lm)  # nothing is compiled before it is called
    assert find_language_model(module)[0] == "lm._orig_mod"
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[HuggingFaceCheckpoint()]
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    loaded = AutoModelForCausalLM.from_pretrained(export_checkpoint(tmp_path / "compiled.ckpt", tmp_path / "out"))
    assert torch.equal(logits(loaded), expected)


def test_without_the_callback_a_configuration_is_asked_for_and_enough(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = LanguageModule()
    checkpoint = save(module, tmp_path)
    command = ["export", str(checkpoint), str(tmp_path / "out")]
    assert main(command) == 2
    assert "HuggingFaceCheckpoint" in (error := capsys.readouterr().err)
    assert "--config" in error
    config().save_pretrained(tmp_path / "config")
    assert main([*command, "--config", str(tmp_path / "config"), "--tokenizer", tokenizer]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(module.lm))
    config(width=32).save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match=r"do not fit this configuration.*size mismatch for"):
        export_checkpoint(checkpoint, tmp_path / "other", config=tmp_path / "config")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tokenizer", "Cannot load the tokenizer ./nope"),
        ("--config", "Cannot load the configuration ./nope (--config"),
    ],
)
def test_what_cannot_be_loaded_is_said_before_anything_is_written(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(LanguageModule(), tmp_path, HuggingFaceCheckpoint())
    assert main(["export", str(checkpoint), str(tmp_path / "out"), option, "./nope"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tied_weight_needs_one_of_its_names(tmp_path: Path) -> None:
    model = GPTNeoXForCausalLM(config(tied=True))
    weights = {f"lm.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    (missing,) = {f"lm.{name}" for name in model.state_dict()} - {*weights}
    torch.save({"state_dict": weights}, tmp_path / "final.ckpt")
    config(tied=True).save_pretrained(tmp_path / "tied")
    out = export_checkpoint(tmp_path / "final.ckpt", tmp_path / "out", config=tmp_path / "tied")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
    config(tied=False).save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match=f'Missing key.*"{missing.removeprefix("lm.")}"'):
        export_checkpoint(tmp_path / "final.ckpt", tmp_path / "out", config=tmp_path / "untied")


def test_one_of_several_models_is_named(tmp_path: Path) -> None:
    class Distilling(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = GPTNeoXForCausalLM(config()).requires_grad_(False)

    with pytest.raises(ValueError, match="2 models of transformers: lm, teacher"):
        save(Distilling(), tmp_path, HuggingFaceCheckpoint())
    module = Distilling()
    checkpoint = save(module, tmp_path, HuggingFaceCheckpoint(submodule="teacher"))
    loaded = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(module.teacher))


def test_one_of_several_models_is_chosen_without_the_callback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {name: GPTNeoXForCausalLM(config()) for name in ("student", "teacher")}
    torch.save({"state_dict": nn.ModuleDict(models).state_dict()}, tmp_path / "last.ckpt")
    config().save_pretrained(tmp_path / "config")
    command = ["export", str(tmp_path / "last.ckpt"), str(tmp_path / "out"), "--config", str(tmp_path / "config")]
    assert main(command) == 2
    assert "may be the one: student, teacher. Choose it: lightning-halos export --submodule" in capsys.readouterr().err
    assert main([*command, "--submodule", "nothing"]) == 2
    assert "has no weights in submodule='nothing'" in capsys.readouterr().err
    assert main([*command, "--submodule", "teacher"]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(models["teacher"]))


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "divided.ckpt").mkdir()
    with pytest.raises(ValueError, match=r"is a folder.*consolidate_checkpoint .*divided.ckpt"):
        export_checkpoint(tmp_path / "divided.ckpt", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export_checkpoint(tmp_path / "nothing.ckpt", tmp_path / "out")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        export_checkpoint(tmp_path / "text.ckpt", tmp_path / "out")
    for text in ("", "hello", "one\ntwo\n", "0", "h\n", "cat"):  # which mean something as a pickle
        (tmp_path / "text.ckpt").write_text(text)
        with pytest.raises(ValueError, match=r"text\.ckpt .*not a checkpoint"):
            export_checkpoint(tmp_path / "text.ckpt", tmp_path / "out")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no state_dict"):
        export_checkpoint(tmp_path / "other.ckpt", tmp_path / "out")
    torch.save({"state_dict": {}, "hyper_parameters": LanguageModule}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="weights_only=False"):
        export_checkpoint(tmp_path / "code.ckpt", tmp_path / "out")


def test_a_checkpoint_writes_into_its_folder_alone(tmp_path: Path) -> None:
    checkpoint = save(LanguageModule(), tmp_path, HuggingFaceCheckpoint())
    contents = torch.load(checkpoint, weights_only=True)
    contents["hugging_face"]["tokenizer_files"] = {"../outside": ""}
    torch.save(contents, checkpoint)
    with pytest.raises(ValueError, match="outside of"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "outside").exists()
