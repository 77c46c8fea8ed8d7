"""A recipe: all that decides an image but its seed. It is written into the image."""

from typing import TYPE_CHECKING, Any

from diffusion_utils import Step, make_steps

if TYPE_CHECKING:
    from weights import Model


def sampling_recipe(
    model: "Model",
    sampling: dict[str, Any],
    *,
    source: str,
    precision: str,
    image_size: int | None = None,
) -> tuple[list[Step], dict[str, Any]]:
    """Return a model's step table and the recipe of its images.

    Args:
        sampling: keys of the config's section that win over the model's own.
        source: where the model is from, for people.
        precision: "float32" or "bfloat16".
        image_size: other than the model's.

    Raises:
        ValueError: an option that says nothing about this sampler, or a size that does not fit.
    """
    settings = model.config.sampling.model_dump() | sampling
    for option, only in (("eta", "ddim"), ("variance", "ddpm")):
        if option in sampling and settings["sampler"] != only:
            raise ValueError(
                f"--{option} belongs to --sampler {only}, and this is {settings['sampler']}"
            )
    steps = make_steps(model.diffusion, **settings)
    size, multiple = image_size or model.config.dataset.image_size, model.network.size_multiple
    if size % multiple:
        near = max(1, round(size / multiple)) * multiple
        raise ValueError(
            f"--image-size {size} is not a multiple of {multiple}, as this network needs; "
            f"try {near}"
        )
    recipe: dict[str, Any] = {
        "checkpoint": source,
        "weights": model.weights,
        "digest": model.digest(),
    }
    recipe |= {"step": model.step, "image_size": size, **settings, "timesteps": len(steps)}
    return steps, recipe | {"precision": precision}
