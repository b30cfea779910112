"""The options of the command line: frozen dataclasses, whose defaults a TOML file may change."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """Draws samples and writes samples.png and samples.npz."""

    config: str | None = None
    """A TOML file of options, snake_case, that differ from the defaults; flags override it."""
    out: str = "runs/sample"
    """The folder to write; must be absent or empty."""
    checkpoint: str | None = None
    """A folder in diffusers' layout, or the id org/name of one on the Hugging Face hub: of one network, or of a Stable Diffusion 1, 2 or XL, which
    is told a --prompt; by default the embedded digits."""
    size: int | None = None
    """Height and width of the images in pixels; by default the checkpoint's sample_size."""
    label: int | None = None
    """The class that is sampled; by default 3 for the embedded digits, none for an unconditional network."""
    prompt: str | None = None
    """Of a text-to-image pipeline: the text that is sampled, whose encoding is the embedding."""
    negative: str | None = None
    """Of a text-to-image pipeline under guidance: the text that is led away from; by default the pipeline's own, empty or zeros."""
    guidance: float = 1.0
    """Scale of classifier-free guidance, with the last class or the negative text as the null one; 1 is none and takes half the work."""
    sampler: str = "dpmpp"
    """ddim, deis, dpmpp, exponential or heun; stochastic: sde-dpmpp, ddim with --eta and exponential with --tau."""
    order: int | None = None
    """Order of deis, dpmpp, exponential and sde-dpmpp; by default 3, 2, 2 and 2."""
    eta: float | None = None
    """Of ddim: the share of the ancestral noise, by default 0."""
    tau: float | None = None
    """Of exponential and sde-dpmpp: the scale of the noise of the reverse SDE, by default 0 and 1."""
    sigma_data: float | None = None
    """Assumed standard deviation of the data: the frame of exponential (1 by default) and heun (infinite by default)."""
    grid: str = "log_snr"
    """uniform, quadratic, log_snr, karras, edm, beta, vp, angle, shifted, linspace, trailing or leading."""
    steps: int = 12
    """Steps of the sampler."""
    t_start: float | None = None
    """Where the grid starts, in the process's own time; by default at its noise end."""
    t_end: float | None = None
    """Where the grid ends; by default at the process's data end."""
    batch: int = 16
    """Number of images."""
    seed: int = 0
    """Seed of the noise."""
    mesh: str | None = None
    """Devices in named axes, data=8 or data=4,fsdp=2: images are spread over all, weights cut along fsdp; by default one device."""
    distributed: bool = False
    """One of several processes that share a run, by jax.distributed.initialize(); needs no telling where JAX_COORDINATOR_ADDRESS is set."""


@dataclass(frozen=True)
class Guide(Sample):
    """Drives the noise and/or the class embedding by gradient through the whole sampler, so that a metric of the images rises."""

    out: str = "runs/guide"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    resume: bool = False
    """Continue the run in --out where its last save left it; starts it where there is none."""
    metric: str = "classifier"
    """classifier, image, colour, layout, inpainting, deblurring, clip, or module:function: images [B, H, W, C] in [-1, 1] -> scores [B], to be
    raised."""
    target: int | None = None
    """The class whose log-probability the metric classifier is; by default 8 for the embedded classifier."""
    classifier: str | None = None
    """A folder with a ConvClassifier; by default the embedded one."""
    target_image: str | None = None
    """The PNG that the metrics image and layout come close to, or that inpainting and deblurring observed."""
    target_colour: str | None = None
    """The mean of the metric colour in [-1, 1], a number a channel: "0.2,-0.5,0.9"."""
    cells: int | None = None
    """Of the metric layout: cells along each side, whose means are compared."""
    seen: str | None = None
    """Of the metric inpainting: the PNG that is white where --target-image was observed."""
    blur: float | None = None
    """Of the metric deblurring: the standard deviation in pixels of the Gaussian blur under which --target-image was observed."""
    noise_level: float | None = None
    """Of inpainting and deblurring: the standard deviation of the observation's noise, pixels in [-1, 1]; by default 0.1."""
    clip: str | None = None
    """Of the metric clip: a folder of transformers' CLIPModel with its tokenizer, or the id org/name of one on the hub."""
    target_prompt: str | None = None
    """The text of the metric clip; by default that of --prompt."""
    drive: str = "noise"
    """noise (x_T), injected (a stochastic sampler's draws), embedding, several joined by +, or both for noise+embedding."""
    project: str = "shell"
    """What keeps noise like noise after each update: shell (its expected norm), chi (the central 90 % of norms), norm (that of the start),
    linf or l2 (a ball of --radius about the start), or none."""
    radius: float | None = None
    """Of the balls linf (an entry) and l2 (an image), in standard deviations of the noise."""
    penalty: float = 0.0
    """Weight of minus the log-density of the noise's norm, an entry, that is subtracted from each image's metric."""
    adjoint: str = "discrete"
    """discrete (exact), kept (exact, linearisations in memory), direct (exact, all in memory), deis, published (AdjointDEIS-2M as published) or
    published-1, last-k (exact through the last k steps, blind to x_T), random-k and low-variance (likewise, one draw for all iterates), or greedy
    (the metric of the network's first guess at the clean image)."""
    adjoint_steps: int | None = None
    """Steps of the adjoints deis and published; by default those of the sampler."""
    adjoint_order: int | None = None
    """Order of deis (1 to 4, by default 3) and published (1 or 2, by default 2)."""
    adjoint_sigma_data: float | None = None
    """The frame of deis, by default 1."""
    adjoint_k: int | None = None
    """Steps that last-k differentiates, at most that random-k does, noisings of low-variance."""
    optimiser: str = "adam"
    """adam, adabelief, adagrad, adamax, amsgrad, lion, nadam, radam, rmsprop, sgd, sign_sgd or yogi, of optax."""
    learning_rate: float = 0.05
    """Learning rate of the optimiser."""
    iterations: int = 25
    """Updates."""
    save_every: int = 5
    """Iterations between saves of the state that --resume starts from."""
    checkpointer: str | None = None
    """How the state is saved: npz, one file by process 0, or orbax, each process its part; by default npz in one process, orbax in several."""


@dataclass(frozen=True)
class Convert:
    """Writes a checkpoint of another project or layout as a folder in diffusers' layout."""

    source: str
    """A folder in diffusers' layout or the id org/name of one on the hub; or one file, .safetensors, .ckpt or .pt: of Stable Diffusion 1, 2 or XL,
    guided-diffusion, DiffAE or EDM."""
    target: str
    """The folder to write; must be absent or empty."""
    kind: str | None = None
    """ldm (Stable Diffusion) or the class of a network, ADM, DiffAE and so on; by default recognised by the tensors' names."""
    config: str | None = None
    """A JSON file of entries of the configuration, which the tensors' shapes do not tell; for Stable Diffusion by component, {"unet": {...}}."""
    variant: str | None = None
    """Which of a folder's several weights, fp16 or bf16; by default those in full precision."""
    dtype: str | None = None
    """float32, float16 or bfloat16, to cast to; by default each tensor keeps its own."""
    weights: str = "ema"
    """ema or raw: which of two sets of weights in one file."""
    prediction: str | None = None
    """epsilon or v_prediction: what a Stable Diffusion predicts; has to be given for version 2."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    local_files_only: bool = False
    """Take what is in the hub's cache and ask nobody."""


KINDS = {"guide": Guide, "sample": Sample, "convert": Convert}
