"""The parameters of the flows, as the forms of the Prefect UI show them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from tasks.destinations import result_in
from tasks.media.encoders import PROFILES
from tasks.models.cards import all_cards
from tasks.request import DEFAULT_MODEL, UpscaleRequest

_MODELS: Final = (DEFAULT_MODEL, *all_cards())

if TYPE_CHECKING:
    ModelName: TypeAlias = str
else:
    #: `compact` and the model cards: a drop-down in the form, and nothing else is taken.
    ModelName = Literal[_MODELS]

Container: TypeAlias = Literal["mp4", "mov", "mkv"]

if TYPE_CHECKING:
    EncoderName: TypeAlias = str
else:
    #: The encoder profiles: a drop-down in the form.
    EncoderName = Literal[tuple(PROFILES)]

#: A video. The server refuses an empty one before a run starts.
Source: TypeAlias = Annotated[str, Field(min_length=1)]

#: Where a result goes. The pattern is for the server, which refuses what cannot be one before a run starts; a flow that
#: is called says more about what is wrong.
Destination: TypeAlias = Annotated[
    str,
    Field(min_length=1, json_schema_extra={"pattern": r"(/|\.([mM][pP]4|[mM][oO][vV]|[mM][kK][vV]))$"}),
]

#: Fields that several forms have.
Scale: TypeAlias = Annotated[
    Literal[2, 3, 4],
    Field(title="Scale", description="How many times larger. Ignored when a height is given."),
]
Height: TypeAlias = Annotated[
    int,
    Field(
        ge=0,
        le=16384,
        multiple_of=2,
        title="Height",
        description="Rows of the result, for example 1080; 0 uses the scale instead.",
    ),
]
RateFactor: TypeAlias = Annotated[
    int,
    Field(
        ge=-1,
        le=63,
        title="Rate factor",
        description="Quality of the result: 0 (best) to 51 for `h264` and `h265`, 1 to 63 for `av1`; -1 is the default"
        " of the encoder. `prores` and `ffv1` have none.",
    ),
]
Preset: TypeAlias = Annotated[
    str,
    Field(
        title="Preset",
        description="How long the encoder may take for a smaller file, such as `slow` for `h264` and `h265` or 4 for"
        " `av1`; empty for the default.",
    ),
]
Stream: TypeAlias = Annotated[
    int,
    Field(ge=-1, title="Video stream", description="Index of the stream to upscale; -1 takes the largest picture."),
]
Deinterlace: TypeAlias = Annotated[
    Literal["auto", "off", "field-rate"],
    Field(
        title="Deinterlace",
        description="`auto` makes a frame of each interlaced picture where the video has them, `field-rate` one of each"
        " field at twice the rate, `off` leaves pictures as they are.",
    ),
]
SquarePixels: TypeAlias = Annotated[
    bool,
    Field(title="Square pixels", description="Make the result of anamorphic video as wide as it is shown."),
]
PoolsName: TypeAlias = Annotated[
    str,
    Field(title="Pools", description="Where to work: `local`, `slurm`, or the name of a block of pools."),
]
Scratch: TypeAlias = Annotated[
    str,
    Field(
        title="Scratch folder",
        description="Where chunk files live while the run goes on; empty for the site's default.",
    ),
]
StoreName: TypeAlias = Annotated[
    str,
    Field(
        title="Media store",
        description="Name of a block that says how to reach S3; empty for the machine's own AWS credentials.",
    ),
]
LedgerName: TypeAlias = Annotated[
    str,
    Field(
        title="Job ledger",
        description="Name of the block that says where records of jobs and metrics go; empty for files on this"
        " machine.",
    ),
]
Owner: TypeAlias = Annotated[
    str,
    Field(
        title="Owner",
        description="Whose job it is: only they get its record and its result. Empty for the user who runs it.",
    ),
]


def _in_order(schema: dict[str, Any]) -> None:
    for position, shown in enumerate(schema.get("properties", {}).values()):
        shown["position"] = position


class Form(BaseModel):
    """Parameters that the UI shows in the order in which they are declared: databases forget that of keys."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_in_order)


class UpscaleOptions(Form):
    """How a video is upscaled. The defaults suit most videos."""

    scale: Scale = 2
    height: Height = 0
    model: ModelName = Field(
        DEFAULT_MODEL,
        title="Model",
        description="`compact` is the bundled model that fits the scale; it runs anywhere. Weights of the others are"
        " fetched with `superres models fetch`.",
    )
    weights: str = Field(
        "",
        title="Weight file",
        description="Path of a .pth or .safetensors file of your own, used instead of the model above.",
    )
    encoder: EncoderName = Field("h264", title="Encoder", description="How the result is encoded.")
    crf: RateFactor = -1
    preset: Preset = ""
    stream: Stream = -1
    deinterlace: Deinterlace = "auto"
    square_pixels: SquarePixels = False
    container: Container = Field(
        "mp4",
        title="Container",
        description="Of the result, when the destination is a folder, which it then gets the name of the source in."
        " The ending of any other destination says it.",
    )
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = Field(
        "auto",
        title="Precision",
        description="In which the model is computed. `int8` is up to twice as fast on CPUs, and used if it keeps 45 dB"
        " against `fp32` on frames of this video; so is `bf16` on CPUs with AMX. `auto` is `fp16` on GPUs and"
        " `fp32` on CPUs.",
    )
    denoise: float = Field(
        1.0,
        ge=0,
        le=1,
        title="Denoise strength",
        description="For models that come in two strengths, such as `realesr-general-x4v3`: 1 removes noise as the"
        " model does by itself, 0 keeps it with the grain.",
    )
    tolerance: int = Field(
        0,
        ge=0,
        le=16,
        title="Tolerance",
        description="Parts of the picture that differ by no more than this many code values (of 255) from what was"
        " upscaled there last are kept as they were. 0 keeps only what is exactly equal, and changes no result; above"
        " it, grain and slow fades may seem to stand still for moments, and results depend on where chunks begin.",
    )
    overwrite: bool = Field(False, title="Overwrite", description="Replace the destination if it exists.")
    salvage: bool = Field(
        False, title="Salvage", description="Keep what decodes of a damaged source instead of failing."
    )
    fresh: bool = Field(False, title="Start afresh", description="Do not use chunks of an earlier, interrupted run.")
    chunk_seconds: float = Field(
        0.0, ge=0, title="Chunk length", description="Seconds of video per chunk; 0 chooses about a minute of work."
    )
    pools: PoolsName = "local"
    scratch: Scratch = ""
    timeline: str = Field(
        "", title="Timeline", description="Path of an SVG picture of who worked on which chunk when; empty for none."
    )
    store: StoreName = ""
    ledger: LedgerName = ""
    owner: Owner = ""
    pictures: bool = Field(
        True,
        title="Pictures",
        description="Show a detail of the video in the UI, before and after. The Prefect server keeps such pictures.",
    )

    def request(self, source: str, destination: str) -> UpscaleRequest:
        """The request these options stand for; zero, empty and a denoise strength of 1 mean "not given"."""
        return UpscaleRequest(
            source=source,
            destination=result_in(destination, source, self.container),
            scale=None if self.height else self.scale,
            height=self.height or None,
            model=self.weights or self.model,
            denoise=None if self.denoise == 1 else self.denoise,
            encoder=self.encoder,
            crf=self.crf if self.crf >= 0 else None,
            preset=self.preset or None,
            stream=self.stream if self.stream >= 0 else None,
            deinterlace=self.deinterlace,
            square_pixels=self.square_pixels,
            precision=self.precision,
            tolerance=self.tolerance,
            scratch=self.scratch or None,
            chunk_seconds=self.chunk_seconds or None,
            overwrite=self.overwrite,
            salvage=self.salvage,
            fresh=self.fresh,
        )

    @classmethod
    def from_request(cls, request: UpscaleRequest, **more: str) -> UpscaleOptions:
        """The options that stand for a request, and those that are no part of one."""
        given = {name: value for name, value in request.to_dict().items() if value is not None}
        given |= model_fields(request.model)
        return cls(**{name: value for name, value in given.items() if name in cls.model_fields}, **more)


class PreviewOptions(Form):
    """What a preview shows, and whether the whole video follows."""

    models: list[ModelName] = Field(
        [DEFAULT_MODEL],
        max_length=8,
        title="Models",
        description="To compare; `compact` is the bundled model that fits the scale.",
    )
    weights: list[str] = Field(
        [],
        max_length=8,
        title="Weight files",
        description="Paths of .pth or .safetensors files of your own, to compare with them.",
    )
    scale: Scale = 2
    height: Height = 0
    excerpts: int = Field(
        3,
        ge=1,
        le=10,
        title="Excerpts",
        description="Parts of the video to look at, as different from one another as they come.",
    )
    seconds: float = Field(
        2.0, gt=0, le=10, title="Seconds", description="Length of an excerpt; shorter where its scene is."
    )
    frames: int = Field(1, ge=1, le=4, title="Pictures", description="Of each excerpt.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        title="Precision",
        description="In which the models are computed: `auto` is `fp16` on GPUs and `fp32` on CPUs.",
    )
    encoder: EncoderName = Field(
        "h264", title="Encoder", description="For the forecast, and for the whole video where it is approved."
    )
    crf: RateFactor = -1
    preset: Preset = ""
    stream: Stream = -1
    deinterlace: Deinterlace = "auto"
    square_pixels: SquarePixels = False
    folder: str = Field(
        "",
        title="Folder of pictures",
        description="Where the pictures are kept; empty for one in the user's data folder.",
    )
    approve: bool = Field(
        False,
        title="Wait for approval",
        description="Wait for somebody to look at the pictures and say with which model to go on, and then upscale the"
        " whole video.",
    )
    hours: float = Field(
        24.0, gt=0, le=720, title="Hours", description="How long to wait for approval; the run fails after that."
    )
    destination: str = Field(
        "",
        title="Destination",
        description="Path or `s3://` URI of the whole result; it can also be given with the approval.",
    )
    pools: PoolsName = "local"
    scratch: Scratch = ""
    store: StoreName = ""
    ledger: LedgerName = ""
    owner: Owner = ""

    @property
    def compared(self) -> tuple[str, ...]:
        """Names and paths of all models to compare."""
        return (*self.models, *self.weights)

    def request(self, source: str, model: str, destination: str = "") -> UpscaleRequest:
        """What upscaling the whole video with one of the models would ask for, with or without a destination."""
        request = self.upscale(model).request(source, destination)
        return request if destination else replace(request, destination="")

    def upscale(self, model: str) -> UpscaleOptions:
        """The options of `upscale-video` for one of the models."""
        shared = UpscaleOptions.model_fields.keys() & type(self).model_fields.keys()
        return UpscaleOptions(**model_fields(model), **{name: getattr(self, name) for name in shared - {"weights"}})


def model_fields(name_or_path: str) -> dict[str, str]:
    """The fields of `UpscaleOptions` that stand for a model given by name or by the path of its weight file."""
    by_name = {name.lower(): name for name in _MODELS}
    known = by_name.get(name_or_path.lower())
    return {"model": known} if known else {"model": DEFAULT_MODEL, "weights": name_or_path}


class EvaluateOptions(Form):
    """How models are compared. The defaults take minutes and suit most clips."""

    mode: Literal["restore", "no-reference"] = Field(
        "restore",
        title="Mode",
        description="`restore` shrinks each clip, lets models restore it and compares with the original. `no-reference`"
        " enlarges the clip itself and says what can be said without an original.",
    )
    scale: Scale = Field(2, description="How many times models enlarge.")
    seconds: float = Field(2.0, gt=0, le=600, title="Seconds", description="Of each clip, taken from its middle.")
    crf: int = Field(
        23,
        ge=0,
        le=51,
        title="CRF",
        description="Rate factor of H.264 at which shrunk clips are coded, as streamed video is; 0 leaves them as they"
        " are. Only for `restore`.",
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        title="Precision",
        description="In which models are computed; `auto` is `fp16` on GPUs and `fp32` on CPUs.",
    )
    folder: str = Field(
        "",
        title="Folder",
        description="For the table and the plots, which replace those of an earlier evaluation there; empty for a new"
        " one in the folder of this installation.",
    )
    pools: PoolsName = "local"
    scratch: Scratch = ""
    store: StoreName = ""
