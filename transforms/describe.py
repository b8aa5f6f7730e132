"""Transforms in words."""

from __future__ import annotations

from collections.abc import Sequence

from transforms.bitflip import bit_probabilities
from transforms.specs import BitflipSpec, Hardware, LoraSpec, OpticalSpec, Quantised, QuantiseSpec


def describe(spec: Hardware | LoraSpec) -> str:
    """The parameters of a transform as one line for people."""
    if isinstance(spec, LoraSpec):
        return f"rank {spec.rank}, alpha {spec.alpha:g}, all other parameters frozen"
    if isinstance(spec, BitflipSpec):
        return _bitflip(spec)
    return _quantise(spec) if isinstance(spec, QuantiseSpec) else _optical(spec)


def _bitflip(spec: BitflipSpec) -> str:
    parts = [spec.lifetime, f"stored as {spec.storage}"] + (["stuck-at cells"] if spec.fault == "stuck_at" else [])
    for name, faults in (("weight", spec.weight), ("input", spec.input), ("output", spec.output)):
        if faults is None:
            continue
        probabilities = bit_probabilities(spec.storage, faults.sign_exponent, faults.mantissa, faults.bits)
        groups = (
            "p per bit"
            if faults.bits
            else f"p {faults.sign_exponent:.4g} sign and exponent, {faults.mantissa:.4g} mantissa"
        )
        cleared = f", 0 from {faults.zero_above:g}" if faults.zero_above else ""
        parts.append(f"{name}: {groups}{cleared} ({_hit_rate(probabilities):.3e} of the values hit)")
    return "; ".join(parts)


def _hit_rate(probabilities: Sequence[float]) -> float:
    missed = 1.0
    for p in probabilities:
        missed *= 1 - p
    return 1 - missed


def _quantise(spec: QuantiseSpec) -> str:
    operands = {"weight": spec.weight, "input": spec.input, "attention": spec.attention}
    parts = [f"{name} {_format(operand)}" for name, operand in operands.items() if operand is not None]
    parts += ["inputs normalised"] if spec.norm else []
    return "; ".join(parts + (["clean gradients"] if spec.gradients == "clean" else []))


def _format(operand: Quantised) -> str:
    scale = {"group": f" per group of {operand.group_size}", None: ""}.get(operand.scale, f" per {operand.scale}")
    scale = {"none": " unscaled", "tracked": " of a tracked range", "learned": " of a learned range"}.get(
        operand.scale or "", scale
    )
    return operand.format + scale + (", rounded at random" if operand.rounding == "stochastic" else "")


def _optical(spec: OpticalSpec) -> str:
    levels = [spec.input_levels or spec.levels, spec.weight_levels or spec.levels, spec.output_levels or spec.levels]
    parts = ["levels of inputs, weights, outputs: {}, {}, {}".format(*levels), f"{spec.rounding} rounding of outputs"]
    parts += [f"modulator floor {spec.lut_floor:g}"] if spec.lut_floor else []
    parts += [f"{spec.photons:g} photons per multiply-accumulate"] if spec.photons else []
    parts += [f"tiles of {spec.tile} inputs"] if spec.tile else []
    return "; ".join([*parts, f"{spec.ranges} ranges"] + (["clean gradients"] if spec.gradients == "clean" else []))
