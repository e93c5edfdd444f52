// Products of activations with weights: weights packed once per call, an epilogue that meets each strip of results
// while it is in the first-level cache, and weight gradients. Sums are fp32, in an order that the shapes alone decide.
// There are two forms of the same names: by AMX's tiles where the processor has them, else by vectors.
#pragma once

#include "linear_tiles.h"
#include "linear_vectors.h"

namespace triton_st {

// Packs several weights, on all threads.
template <class C>
void pack_all(std::initializer_list<PackedWeight<C>*> weights) {
  int64_t units = 0, lanes = 0;
  for (const PackedWeight<C>* weight : weights) {
    units += weight->panels();
    lanes += weight->panels() * weight->panel_lanes();
  }
  parallel(units, lanes / 4, [&](int64_t unit) {
    for (PackedWeight<C>* weight : weights) {
      if (unit < weight->panels()) return weight->pack_panel(unit);
      unit -= weight->panels();
    }
  });
}

}  // namespace triton_st
