// A team of lanes that works through phases: one source for the host and for a device.
//
// A phase is a number of items that know nothing of each other; it ends before the next one begins. On a device the
// lanes are the threads of a block and share out the items; on the host one loop takes them in any order. Nothing else
// is promised, so what comes out depends on no order of lanes or teams.
#pragma once

#if defined(__CUDACC__)
#define RLSPEC_BOTH __host__ __device__
#else
#define RLSPEC_BOTH
#endif

namespace rlspec {

inline constexpr int kLanes = 128;

#if defined(__CUDACC__)
class DeviceTeam {
 public:
  template <class Item>
  __device__ void each(int count, Item item) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kLanes) item(i);
    __syncthreads();
  }
};
#endif

// The sum of `term(i)`, i < count, by halves, so that it is the same on every team. `parts`: kLanes numbers that the
// team shares; the first holds the sum until the next phase that writes there.
template <class Team, class Number, class Term>
RLSPEC_BOTH Number sum(const Team& team, int count, Number* parts, Term term) {
  team.each(kLanes, [=](int lane) {
    Number part = 0;
    for (int i = lane; i < count; i += kLanes) part += term(i);
    parts[lane] = part;
  });
  for (int half = kLanes / 2; half > 0; half /= 2) {
    team.each(half, [=](int lane) { parts[lane] += parts[lane + half]; });
  }
  return parts[0];
}

}  // namespace rlspec
