"""Grids of times: `steps + 1` strictly decreasing numbers, numpy float64, made outside of the sampler and passed to it.

Every function takes `(process, steps, *, t_start=None, t_end=None)`; the ends default to `process.span`. Any array of one's own is as good.
A grid means noise levels of the state, sigma/alpha at each time; `final` says how it ends (`_base`). A reference's rule is found so:

    Karras et al., k-diffusion, diff-sampler   karras; log_snr (exponential, logsnr); polyexponential; vp (time_uniform)
    DPM-Solver, UniPC (Lu et al.)              uniform, quadratic, log_snr
    DEIS (th_deis)                             power (t), log_snr (log), karras (rho)
    diffusers, training steps                  linspace, leading, trailing
    diffusers, levels                          karras, log_snr (exponential, lu), beta, shifted (flow), ays

with final="append_zero" where it goes on to sigma = 0 from the last of its levels, and "replace_by_zero" where it does so in place of it. What a
reference tells its network where that is not the level of the state is `model_times`.
"""

from ..processes import zero_terminal_snr as zero_terminal_snr
from ._ays import ays as ays
from ._base import Final as Final, Grid as Grid, check as check
from ._flow import shift_time as shift_time, shifted as shifted
from ._spacings import (
    angle as angle,
    beta as beta,
    edm as edm,
    karras as karras,
    log_snr as log_snr,
    polyexponential as polyexponential,
    power as power,
    quadratic as quadratic,
    uniform as uniform,
    vp as vp,
)
from ._training import (
    at_model_times as at_model_times,
    leading as leading,
    linspace as linspace,
    model_times as model_times,
    trailing as trailing,
)

exponential = lu = log_snr
"""k-diffusion's and diffusers' names of `log_snr`."""
