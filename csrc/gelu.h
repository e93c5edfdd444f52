// The exact GELU, x · Φ(x), and its derivative.
#pragma once

#include "vector.h"

namespace triton_st {

// Φ, the normal distribution function, and e^(−x²/2), which its derivative is a multiple of.
struct Normal {
  Vec below, bell;
};

// Φ(−|x|) = e^(−x²/2) · t · P(t), t = 1 / (1 + 0.21 |x|): P is fitted to 1.6e-8 relative error for |x| < 14, beyond
// which the exponential is 0. One exponential serves both results and every x.
inline Normal normal(Vec x) {
  const Vec size = absolute(x), bell = exp(x * x * -0.5f);
  const Vec t = 1.f / fma(size, splat(0.21f), splat(1.f));
  Vec p = splat(-0.0716563538f);
  p = fma(p, t, splat(0.283588827f));
  p = fma(p, t, splat(-0.330254018f));
  p = fma(p, t, splat(0.349401802f));
  p = fma(p, t, splat(-0.0939258114f));
  p = fma(p, t, splat(0.124873005f));
  p = fma(p, t, splat(0.0691920966f));
  p = fma(p, t, splat(0.0850688666f));
  p = fma(p, t, splat(0.083711572f));
  const Vec tail = bell * (t * p);
  return {x > 0.f ? 1.f - tail : tail, bell};
}

inline Vec gelu(Vec x) { return x * normal(x).below; }

struct GeluAndSlope {
  Vec value, slope;
};

// Φ(x) + x · φ(x) is the slope.
inline GeluAndSlope gelu_and_slope(Vec x) {
  const Normal n = normal(x);
  return {x * n.below, fma(x * 0.398942280f, n.bell, n.below)};
}

}  // namespace triton_st
