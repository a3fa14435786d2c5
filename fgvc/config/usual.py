"""Names that other trainers (Ultralytics, timm, fastai, MMPretrain, Keras) give to settings, and what these are called here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from fgvc.config.shape import models_in
from fgvc.io.names import nearest

USUAL: Mapping[str, str] = {
    name: key
    for key, names in {
        "train.epochs": "epoch n_epoch n_epochs num_epochs max_epochs max_epoch total_epochs nb_epochs",
        "train.max_steps": "max_iters max_iter total_steps num_steps steps_per_epoch iterations",
        "train.batch_size": "batch bs batchsize train_batch_size samples_per_gpu per_device_train_batch_size",
        "train.seed": "random_seed random_state rng_seed",
        "train.workers": "num_workers nw n_workers workers_per_gpu dataloader_num_workers",
        "train.precision": "amp half fp16 bf16 mixed_precision amp_dtype to_fp16 dtype",
        "train.device": "gpu gpus gpu_ids cuda accelerator devices",
        "train.patience": "early_stopping early_stop earlystopping early_stopping_patience",
        "train.grad_accum_steps": "accum accumulate grad_accum gradient_accumulation gradient_accumulation_steps "
        "accumulate_grad_batches update_interval nbs",
        "train.grad_checkpointing": "gradient_checkpointing with_cp",
        "train.sampling": "sampler class_balanced oversample",
        "train.validate_every": "val_interval eval_interval val_every validation_freq",
        "image.size": "imgsz img_size image_size input_size size img_sz resize resolution target_size input_shape crop_size res",
        "optim.lr": "lr0 base_lr learning_rate lr_max init_lr initial_lr blr base_learning_rate",
        "optim.min_lr": "lrf eta_min lr_min final_lr",
        "optim.weight_decay": "wd decay l2",
        "optim.name": "opt optimizer optimiser opt_name opt_func",
        "optim.schedule": "sched scheduler lr_scheduler lr_schedule cos_lr lr_policy policy_lr",
        "optim.warmup_epochs": "warmup warm_up warmup_iters warmup_steps warmup_t",
        "optim.clip_grad": "clip grad_clip clip_norm max_norm max_grad_norm clipnorm gradient_clip_val",
        "optim.layer_decay": "layerwise_decay llrd paramwise_cfg",
        "optim.sam": "sam_rho",
        "model.backbone": "arch architecture net network model_name backbone_name model_type encoder",
        "model.weights": "pretrained checkpoint_path initial_checkpoint load_from finetune init_cfg ckpt pretrained_path",
        "model.freeze": "frozen_stages freeze_layers freeze_at trainable freeze_backbone",
        "model.kwargs": "drop_path drop_path_rate drop drop_rate dropout dropout_rate",
        "data.root": "data_dir data_path data_root data_prefix dataset dataset_path dataset_dir train_dir train_path path folder "
        "directory imagefolder img_dir",
        "data.val_fraction": "val_split validation_split valid_pct val_pct val_ratio val_size valid_ratio fraction",
        "data.test_fraction": "test_split test_size test_ratio",
        "data.fold": "k_fold kfold n_folds cv",
        "data.classes": "class_names names class_map",
        "loss.label_smoothing": "smoothing label_smooth ls",
        "loss.kind": "criterion loss_fn loss_func loss_function loss_name",
        "loss.class_weights": "class_weight weight_classes cls_pw",
        "ema.decay": "model_ema_decay ema_decay ema_momentum",
        "ema": "model_ema use_ema ema_model",
        "augment.policy": "aa auto_augment autoaugment auto_aug augmentation augmentations randaugment trivialaugment augmix",
        "augment.pipeline": "transform transforms tfms batch_tfms item_tfms train_pipeline albumentations",
        "augment.flip": "hflip fliplr horizontal_flip do_flip",
        "augment.vertical_flip": "vflip flipud flip_vert",
        "augment.rotate": "degrees rotation rotation_range max_rotate",
        "augment.zoom": "zoom_range max_zoom",
        "augment.shear": "shear_range",
        "augment.translate": "width_shift_range height_shift_range",
        "augment.crop_scale": "scale min_scale random_resized_crop",
        "augment.crop_ratio": "ratio aspect_ratio",
        "augment.brightness": "color_jitter colour_jitter hsv_v jitter max_lighting",
        "augment.saturation": "hsv_s",
        "augment.hue": "hsv_h",
        "techniques.mixup": "mixup mixup_alpha mixup_prob",
        "techniques.cutmix": "cutmix cutmix_alpha",
        "techniques.random_erasing": "reprob erasing random_erase recount remode",
        "techniques.cutout": "cutout",
        "techniques.mosaic": "mosaic close_mosaic",
        "techniques.distill": "teacher distillation kd",
        "deploy.mean": "mean",
        "deploy.std": "std",
        "deploy.crop_pct": "crop_pct center_crop",
        "deploy.interpolation": "interpolation train_interpolation",
        "checkpoint.every_steps": "save_period save_steps save_freq",
        "checkpoint.keep": "save_total_limit",
        "checkpoint.keep_best": "checkpoint_hist max_keep_ckpts save_top_k keep_checkpoint_max",
        "select_by": "monitor metric eval_metric save_best metric_for_best_model",
        "log.every_steps": "log_interval log_every print_freq logging_steps",
        "log.to": "logger tracker loggers report_to vis_backends log_wandb",
        "export.opset": "opset_version opset",
    }.items()
    for name in names.split()
}
"""Another trainer's name of a setting -> its key here."""

OPTIONS: Mapping[str, str] = {
    name: option
    for option, names in {
        "the run's folder is an option of `fgvc train`: --out": "out output output_dir work_dir save_dir project name exp_name "
        "experiment run_dir run_name logdir log_dir",
        "to go on with a run give the same command, or --resume": "resume resume_from continue",
        "to lose a run that is there give --overwrite": "exist_ok overwrite force",
        "the classes are those of the data": "num_classes nc n_classes n_out",
    }.items()
    for name in names.split()
}
"""Another trainer's name of what is no setting here -> what it is."""

MAIN_KEYS = {
    "data": "root", "image": "size", "model": "backbone", "optim": "name", "loss": "kind", "ema": "decay", "swa": "start",
    "augment": "policy", "train": "epochs", "log": "to", "export": "opset", "checkpoint": "keep", "deploy": "resize",
}  # fmt: skip
"""The key of a section that is meant where the section is given a value."""


def usual_key(model: type[BaseModel], names: tuple[str, ...]) -> str:
    """Suggest what an unknown key means (`names`: the keys on the way to it): another trainer's name of a setting, or a key of
    another section. Empty where neither is likely."""
    name = names[-1].lower().replace("-", "_")
    keys = _keys(model)
    above = [key for key in keys.get(name, ()) if key.partition(".")[0] != names[0]]
    if name in USUAL and any(USUAL[name] in paths for paths in keys.values()):
        return f"did you mean {USUAL[name]}?"
    if len(above) == 1:
        return f"did you mean {above[0]}?"
    if len(names) == 1 and name in OPTIONS:
        return OPTIONS[name]
    if len(names) == 1 and not above and (near := nearest(name, keys)) and len(paths := keys[near[0]]) == 1:
        return f"did you mean {paths[0]}?"
    return ""


def usual_value(names: tuple[str, ...], value: object) -> str:
    """Suggest the setting that is meant where a section is given a plain value."""
    path = ".".join(names)
    if value is True:
        return f"{path}={{}} is all of its defaults"
    if len(names) == 1 and isinstance(value, str | int | float) and names[0] in MAIN_KEYS:
        key = MAIN_KEYS[names[0]]
        if names[0] == "model" and isinstance(value, str) and Path(value).suffix:
            key = "onnx" if value.endswith(".onnx") else "weights"
        return f"did you mean {path}.{key}={value}?"
    return ""


@cache
def _keys(model: type[BaseModel]) -> dict[str, list[str]]:
    """The last name of each key of a recipe -> the whole keys. Nothing of installed packages is imported."""
    keys: dict[str, list[str]] = {}

    def walk(section: type[BaseModel], above: str) -> None:
        for name, field in section.model_fields.items():
            paths = keys.setdefault(name, [])
            if (path := f"{above}{name}") not in paths:
                paths.append(path)
            for inner in models_in(field.annotation):
                walk(inner, f"{path}.")

    walk(model, "")
    return keys


def settings_of(model: type[BaseModel]) -> set[str]:
    """All keys of a recipe, sections as well."""
    return {path for paths in _keys(model).values() for path in paths}

