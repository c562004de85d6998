# SPDX-License-Identifier: Apache-2.0
"""`dcae-jax models`: the table of variants."""

import math

import pytest

from dcae_jax import models
from dcae_jax.errors import UserError
from dcae_jax.jobs import variants
from dcae_jax.models import dcae, dit, sdvae, uvit

# Millions of parameters as their papers give them: DiT, Table 1 (256 pixels, 4 channels), without
# what depends on the latents; sd-vae-f8: 83.7 (diffusers' AutoencoderKL of Stable Diffusion).
DIT = {"s": 33, "b": 130, "l": 458, "xl": 675}


def test_every_variant_and_published_name_has_a_row():
    """Catches a variant that is missing, and a scaling factor of other weights."""
    ours = ("-", "this package")
    rows = {row[0] if row[5] in ours else row[5]: row for row in variants.autoencoder_rows(dcae)}
    assert rows.keys() >= dcae.PUBLISHED.keys() | {"tiny", "small"}
    assert rows["small"][4:6] == ["0.0347", "this package"] and rows["small-lite"][5] == "-"
    assert {row[0] for row in rows.values()} == dcae.VARIANTS.keys()
    assert (
        rows["dc-ae-f32c32-in-1.0"][4] == "0.3189" and rows["dc-ae-f32c32-mix-1.0"][4] == "0.4552"
    )
    assert rows["dc-ae-f32c128-1.5"][4] == "-" and rows["dc-ae-f32c32-sana-1.1"][4] == "0.41407"
    assert rows["dc-ae-f128c512-in-1.0"][2:4] == [128, 512]


def test_parameters_are_those_of_the_papers():
    """Catches counts with the statistics, of half of a model, or of another variant."""
    (row,) = variants.autoencoder_rows(sdvae)
    assert row[1] == 83_653_863
    for module in (dit, uvit):
        assert {row[1] for row in variants.backbone_rows(module)} == module.VARIANTS.keys()
    counts = {row[1]: row[5] / 1e6 for row in variants.backbone_rows(dit)}
    for name, millions in DIT.items():
        assert math.isclose(counts[name], millions, rel_tol=0.02), (name, counts[name])


def test_the_command_lists_every_file_of_models(capsys):
    """Catches a model file that the command leaves out."""
    assert variants.main([]) == 0
    said = capsys.readouterr().out
    for module in models.autoencoders():
        assert all(f"\n{name} " in said for name in module.VARIANTS)
    for module in models.backbones():
        assert said.count(f"\n{models.name_of(module)} ") == len(module.VARIANTS)
    assert variants.main(["--diffusion"]) == 0
    assert "f32c32" not in capsys.readouterr().out


def test_the_models_of_a_folder_are_those_that_load(
    autoencoder_export, generator_run, tmp_path, capsys
):
    """Catches a run that has saved nothing, somebody's config.json, and a model without its row."""
    for name, text in (("fresh", '{"config": {"model": {}}}'), ("other", '{"a": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (row,) = variants.local_rows(autoencoder_export)
    assert row[:3] == [autoencoder_export, "autoencoder", "-"]
    (row,) = variants.local_rows(generator_run)
    assert row[:3] == [generator_run, "generator", "4"] and row[3].endswith(" MB")
    assert variants.main([generator_run, autoencoder_export]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    with pytest.raises(UserError, match="holds no model; name a folder of workdirs"):
        variants.local_rows(str(tmp_path))


def test_sizes_and_licences():
    """Catches a size in parameters, and a licence of other weights."""
    rows = {row[0] if row[5] == "-" else row[5]: row for row in variants.autoencoder_rows(dcae)}
    assert rows["dc-ae-f32c32-in-1.0"][6:] == ["1,293 MB", "see the hub"]
    assert rows["dc-ae-f32c32-sana-1.1"][6:] == ["1,249 MB", "MIT"]
    assert rows["tiny"][6:] == ["6.0 MB", "-"]
