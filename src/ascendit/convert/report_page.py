"""The HTML report of `quantize`: sizes, SQNR and bits of every layer. Imports matplotlib, not torch."""

from __future__ import annotations

from collections.abc import Iterator

from ascendit.convert.report import WORST, QuantizedExpert, QuantizeReport, calibration_text, lora_lines
from ascendit.pages import charts
from ascendit.pages.page import Figure, Page, Section, Table
from ascendit.report import human_bytes


def quantize_page(report: QuantizeReport) -> Page:
    """The page of one run."""
    about = {"model": f"{report.source} ({report.model_kind})", "output": report.path.name}
    about |= {"recipe": report.recipe, "command": report.command}
    about |= {"LoRA": "; ".join(lora_lines(report.loras))}
    about |= {"smoothing": calibration_text(report.calibration) if report.calibration else ""}
    about |= {"warnings": "; ".join(report.warnings)}
    return Page(title=f"Quantized: {report.path.name}", about=about, sections=tuple(_sections(report)))


def _sections(report: QuantizeReport) -> Iterator[Section]:
    """The sections of the page: summary, SQNR, formats, outputs of layers, all layers."""
    experts = report.experts
    before = {f"{x.name}, before": x.bytes_before for x in experts}
    after = {f"{x.name}, after": x.bytes_after for x in experts}
    sizes = {name: n for pair in zip(before.items(), after.items(), strict=True) for name, n in pair}
    texts = {name: human_bytes(n) for name, n in sizes.items()}
    unit, divisor = ("GiB", 2**30) if max(sizes.values()) >= 2**30 else ("MiB", 2**20)
    bars = charts.bars({name: n / divisor for name, n in sizes.items()}, unit, texts)
    sizes_figure = Figure(svg=bars, caption="Size of the tensors of each transformer, scales included.")
    yield Section("Summary", [_summary_table(report), sizes_figure])
    sqnr = {x.name: x.sqnr for x in experts if x.sqnr}
    if sqnr:
        caption = (
            "Signal-to-quantization-noise ratio of each weight, by block and kind of layer. Higher is better."
        )
        yield Section(
            "SQNR of the weights",
            [
                Figure(svg=charts.by_depth(sqnr, "SQNR in dB"), caption=caption),
                *(_worst_table(x) for x in experts if x.sqnr),
            ],
        )
    caption = "Scheme and bits per weight of each linear layer of the blocks, scales included."
    formats = {x.name: {name: layer.text() for name, layer in x.stored.items()} for x in experts}
    rows = [(x.name, reason, ", ".join(names)) for x in experts for reason, names in x.kept.items()]
    excluded = Table(head=("transformer", "reason", "layers"), rows=rows, title="Not quantized")
    yield Section("Formats", [Figure(svg=charts.grid(formats), caption=caption), excluded])
    for expert in experts:
        if expert.outputs.layers:
            yield Section(f"Outputs of layers of {expert.name}", [_outputs_table(expert)], _OUTPUTS_TEXT)
    yield Section("Layers", [_layers_table(expert) for expert in experts])


_OUTPUTS_TEXT = "SQNR on captured activations, with both weight and activation quantized."


def _summary_table(report: QuantizeReport) -> Table:
    head = ("transformer", "layers", "before", "after", "bits per weight", "mean SQNR", "worst SQNR")
    rows = []
    for x in report.experts:
        values = list(x.sqnr.values())
        decibels = (f"{sum(values) / len(values):.2f} dB", f"{min(values):.2f} dB") if values else ("-", "-")
        sizes = (human_bytes(x.bytes_before), human_bytes(x.bytes_after), f"{x.bits_per_weight:.2f}")
        rows.append((x.name, x.counts(), *sizes, *decibels))
    total = (human_bytes(report.bytes_before), human_bytes(report.bytes_after))
    rows.append(("in all", "", *total, f"{report.bits_per_weight:.2f}", "", ""))
    return Table(head=head, rows=rows)


def _worst_table(expert: QuantizedExpert) -> Table:
    rows = [(name, _format(expert, name), f"{value:.2f} dB") for name, value in expert.worst]
    title = f"The {len(rows)} worst layers of {expert.name}"
    return Table(head=("layer", "format", "SQNR"), rows=rows, title=title)


def _outputs_table(expert: QuantizedExpert) -> Table:
    rows = [
        (name, f"{q.plain:.2f} dB", f"{q.smoothed:.2f} dB", f"{q.smoothed - q.plain:+.2f} dB")
        for name, q in expert.outputs.rows(WORST)
    ]
    return Table(head=("layers", "without smoothing", "smoothed", "gain"), rows=rows)


def _layers_table(expert: QuantizedExpert) -> Table:
    rows = [
        (
            name,
            layer.scheme,
            f"{layer.bits:.2f}",
            f"{expert.sqnr[name]:.2f} dB" if name in expert.sqnr else "-",
        )
        for name, layer in expert.stored.items()
    ]
    title = f"All {len(rows)} linear layers of {expert.name}"
    return Table(head=("layer", "scheme", "bits per weight", "SQNR"), rows=rows, title=title, folded=True)


def _format(expert: QuantizedExpert, name: str) -> str:
    layer = expert.stored.get(name)
    return layer.text() if layer else ""
