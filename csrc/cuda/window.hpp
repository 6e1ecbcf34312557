// The eigenvectors of a symmetric positive semidefinite 32 x 32 matrix in shared memory, by Jacobi rotations, 16 at a
// time. It is the Gram matrix of a window: the columns of two blocks that are to become orthogonal.
#pragma once

#include <cmath>

#include "team.hpp"

namespace rlspec {

inline constexpr int kBlock = 16;            // columns of a block
inline constexpr int kWindow = 2 * kBlock;   // columns of two
inline constexpr int kStride = kWindow + 1;  // of a row in shared memory: odd, so that columns lie on different banks

struct Pair {
  int first, second;  // first < second
};

// The tournament of `players`, an even number: everybody meets everybody once in players - 1 rounds of players / 2
// games.
RLSPEC_BOTH inline Pair game(int players, int round, int table) {
  const int others = players - 1;
  const int a = table == 0 ? others : (round + table) % others;
  const int b = (round - table + others) % others;
  return a < b ? Pair{a, b} : Pair{b, a};
}

template <class Real>
struct Window {
  Real gram[kWindow * kStride];
  Real turn[kWindow * kStride];  // columns: the eigenvectors
  Real tile[kWindow * kStride];  // a piece of the columns, one after another
  Real cosine[kBlock], sine[kBlock];
  Real parts[kWindow];
  Real off;  // the largest cosine between two of the columns
};

// What orthogonalises two columns with the squares of lengths `a`, `b` and the product `ab`: the smaller of two angles.
// A product up to `tolerance` of the lengths is rounding: columns of one length would be turned by any angle for it.
template <class Real>
RLSPEC_BOTH void rotation(Real a, Real b, Real ab, Real tolerance, Real* cosine, Real* sine) {
  *cosine = 1;
  *sine = 0;
  if (std::abs(ab) <= tolerance * std::sqrt(a) * std::sqrt(b)) return;
  const Real zeta = (b - a) / (2 * ab);
  const Real tangent = (zeta < 0 ? Real(-1) : Real(1)) / (std::abs(zeta) + std::sqrt(1 + zeta * zeta));
  *cosine = 1 / std::sqrt(1 + tangent * tangent);
  *sine = *cosine * tangent;
}

// One sweep over all pairs of the window: `gram` comes close to diagonal, `turn` holds the product of the rotations.
template <class Team, class Real>
RLSPEC_BOTH void sweep_window(const Team& team, Real tolerance, Window<Real>* w) {
  for (int round = 0; round < kWindow - 1; ++round) {
    team.each(kBlock, [=](int k) {
      const Pair p = game(kWindow, round, k);
      rotation(w->gram[p.first * kStride + p.first], w->gram[p.second * kStride + p.second],
               w->gram[p.first * kStride + p.second], tolerance, &w->cosine[k], &w->sine[k]);
    });
    // The 2 x 2 blocks where the pairs of rows and of columns meet know nothing of each other.
    constexpr int kMeetings = kBlock * kBlock;
    team.each(kMeetings + kWindow * kBlock, [=](int item) {
      const int k = item % kBlock, l = item / kBlock;
      const Pair columns = game(kWindow, round, k);
      const Real c = w->cosine[k], s = w->sine[k];
      if (item >= kMeetings) {
        Real* row = w->turn + (l - kBlock) * kStride;
        const Real x = row[columns.first], y = row[columns.second];
        row[columns.first] = c * x - s * y;
        row[columns.second] = s * x + c * y;
        return;
      }
      const Pair rows = game(kWindow, round, l);
      const Real cl = w->cosine[l], sl = w->sine[l];
      Real* upper = w->gram + rows.first * kStride;
      Real* lower = w->gram + rows.second * kStride;
      const Real ux = c * upper[columns.first] - s * upper[columns.second];
      const Real uy = s * upper[columns.first] + c * upper[columns.second];
      const Real lx = c * lower[columns.first] - s * lower[columns.second];
      const Real ly = s * lower[columns.first] + c * lower[columns.second];
      upper[columns.first] = cl * ux - sl * lx;
      upper[columns.second] = cl * uy - sl * ly;
      lower[columns.first] = sl * ux + cl * lx;
      lower[columns.second] = sl * uy + cl * ly;
    });
  }
}

// Hundreds of rotations leave `turn` short of orthogonal by more than rounding, and always on the same side: one Newton
// step for the polar factor mends that. `tile` and `gram` are lost.
template <class Team, class Real>
RLSPEC_BOTH void make_orthogonal(const Team& team, Window<Real>* w) {
  team.each(kWindow * kWindow, [=](int item) {
    const int i = item / kWindow, j = item % kWindow;
    Real product = i == j ? Real(-1) : Real(0);
    for (int k = 0; k < kWindow; ++k) product += w->turn[k * kStride + i] * w->turn[k * kStride + j];
    w->tile[i * kStride + j] = product;
  });
  team.each(kWindow * kWindow, [=](int item) {
    const int i = item / kWindow, j = item % kWindow;
    Real change = 0;
    for (int k = 0; k < kWindow; ++k) change += w->turn[i * kStride + k] * w->tile[k * kStride + j];
    w->gram[i * kStride + j] = change / 2;
  });
  team.each(kWindow * kWindow, [=](int item) {
    const int i = item / kWindow, j = item % kWindow;
    w->turn[i * kStride + j] -= w->gram[i * kStride + j];
  });
}

}  // namespace rlspec
