"""Advice for recipes and settings of earlier versions: old name -> what to use instead."""

from __future__ import annotations

_COMMIT = "commit 7e64cac still has it"
_DERIVED = "it follows from generator.architecture: scalable draws pixels, paper standardised images"
#: Shipped recipes that are gone.
RECIPES = {
    "dfad+": "use auto: it takes these settings by itself for a teacher without batch norm",
    "auto-seg": "use auto: it takes these settings by itself for a teacher that answers every pixel",
    **dict.fromkeys(("fast", "nayer", "dfq", "deepinversion"), f"use pool; {_COMMIT}"),
    **dict.fromkeys(("zskt", "dafl"), f"use auto; {_COMMIT}"),
}
#: Settings that are gone. A section stands for all that was in it.
SETTINGS = {
    "adapt": "recipe auto adapts to the teacher, but for the settings that are given by --set",
    "pinned": "what --set gives is kept; leave it away",
    "student.inherited_rate": "use student.optimizer.learning_rate",
    "student.quantise_from": f"INT8 is calibrated after training; {_COMMIT}",
    "student.optimizer.momentum": "it is 0.9",
    "student.optimizer.second_beta": "it is 0.999",
    "student.optimizer.nesterov": 'use student.optimizer.kind = "nesterov"',
    "generator.output": _DERIVED,
    "generator.latent_rate": "latents move at the generator's rate",
    "generator.reset_every": f"the generator begins anew only after a collapse; {_COMMIT}",
    "generator.meta": f"use recipe pool; {_COMMIT}",
    "generator.low_resolution": f"all images have the input size; {_COMMIT}",
    "generator.low_resolution_scale": f"all images have the input size; {_COMMIT}",
    "generator.temperature": "it is 1",
    "generator.adversarial": "it is 1; set the weights in [prior] relative to it",
    "generator.optimizer.kind": "it is Adam",
    "generator.optimizer.second_beta": "it is 0.999",
    "generator.optimizer.nesterov": "the optimizer is Adam",
    "generator.optimizer.weight_decay": "it is 0",
    "prior.targets": "noisy latents have balanced classes, fresh ones the teacher's argmax",
    "prior.balance_momentum": f"use a larger batch_size; {_COMMIT}",
    "prior.activation": f"use prior.one_hot; {_COMMIT}",
    "prior.total_variation": f"use prior.batch_norm; {_COMMIT}",
    "prior.l2": f"use prior.batch_norm; {_COMMIT}",
    "replay.average_share": f"use replay.share; {_COMMIT}",
    "replay.echoes": "use replay.repeats",
    "replay.max_mebibytes": "the replay buffer takes 512 MiB at most; use replay.capacity",
    "replay.reservoir": "it holds 1,024 images",
    "augmentation.shift": "replayed images move by up to 2 pixels",
    "augmentation.flip": f"replayed images are not mirrored; {_COMMIT}",
    "compute.channels_last": "the networks decide it",
    "calibration.generator": "it is 0.25",
    "calibration.prior": "it is 0.25",
    "verify.max_student_drop": "it is 0.01; verify.compare_export=false switches it off",
    "verify.min_fp32_agreement": "verify.compare_export=false switches comparison A off",
    "verify.max_fp32_disagreements": "it is 0; verify.compare_export=false switches comparison A off",
    "verify.max_fp32_logit_error": "it is 1e-4; verify.compare_export=false switches comparison A off",
    "verify.min_fp16_sqnr_db": "it is 40; verify.compare_export=false switches comparison A off",
    "verify.snapshots": "they are 8",
    "verify.prior_steps": "they are 600, at most a third of the generator's updates",
    "verify.sharpen_steps": "they are 40, at most a quarter of the images of the run",
    "verify.procedural_share": "it is 0.25",
    "verify.adversary_steps": "they are 150, at most a tenth of the generator's updates",
    "verify.adversary_restarts": "they are 2",
    "verify.required": "use --require",
}
#: Sections that are settings now.
SECTIONS = {"generator.schedule": 'use generator.schedule = "as_student" or "constant"'}
#: Values of settings that are gone.
VALUES = {
    ("generator.architecture", "free_pixels"): f"use scalable; {_COMMIT}",
    ("generator.latents", "shared"): f"use fresh; {_COMMIT}",
    ("generator.latents", "optimised"): f"use noisy; {_COMMIT}",
    ("generator.discrepancy", "kl"): f"use l1; {_COMMIT}",
    ("generator.discrepancy", "js"): f"use agree_kl; {_COMMIT}",
}
