// Batched singular value decomposition of small square matrices by one-sided Jacobi (Hestenes), in blocks.
//
// The columns of G = A V are rotated, two blocks at a time, until they are orthogonal: then G = U S, and A = U S Vᵀ.
// What a rotation wants is the Gram matrix of the two blocks (window.hpp); it is applied to G, and to V where that is
// wanted. In a round of a sweep the pairs of blocks are disjoint, so one team takes each, of every matrix at once.
//
// For a symmetric A with all eigenvalues above zero U and V are the same, so V need not be kept: a symmetric matrix is
// shifted there by whoever calls. A start, an orthogonal basis near V, is a first product, and by whoever calls, too.
//
// All arrays are dense, matrix after matrix, and a matrix is held by its columns, one after another.
#pragma once

#include <cstdint>
#include <limits>

#include "team.hpp"
#include "window.hpp"

namespace rlspec {

// kRunning at the end: the sweeps were not enough. kNotFinite: NaN, infinity, or squares that overflow.
enum Status : int { kConverged = 0, kRunning = 1, kNotFinite = 2 };

template <class Real>
inline constexpr Real kEpsilon = std::numeric_limits<Real>::epsilon();
template <class Real>
inline constexpr Real kLargest = std::numeric_limits<Real>::max();

template <class Real>
struct Jacobi {
  int batch, n, most_sweeps;
  Real* g;        // batch x n x n; on entry A V, destroyed
  Real* v;        // batch x n x n; on entry the start; null where V is not wanted
  Real* left;     // batch x n x n; U by descending values
  Real* right;    // the same of V, or null
  Real* values;   // batch x n
  int* status;    // batch
  int* sweeps;    // batch; how many it took, the last one only looked
  Real* norms;    // batch x n; workspace, as what follows
  Real* least;    // batch; a column that is no longer than this is rounding
  Real* cosines;  // batch x games; the largest cosine of a sweep at each table

  RLSPEC_BOTH int blocks() const { return (n + kWindow - 1) / kWindow * 2; }  // even; what is past n counts as zeros
  RLSPEC_BOTH int games() const { return blocks() / 2; }
  RLSPEC_BOTH std::int64_t at(int matrix, int column) const { return (std::int64_t{matrix} * n + column) * n; }

  // The cosine of two computed columns is not known better than this.
  RLSPEC_BOTH Real tolerance() const {
    return std::sqrt(static_cast<Real>(n)) * kEpsilon<Real>;
  }
};

// The larger of two, or NaN where one is.
template <class Real>
RLSPEC_BOTH Real worse(Real a, Real b) {
  return a != a || a >= b ? a : b;
}

// Lengths of columns: a team for each.
template <class Real>
struct MeasureColumns {
  Jacobi<Real> job;
  struct Shared {
    Real parts[kLanes];
  };

  template <class Team>
  RLSPEC_BOTH void operator()(const Team& team, int column, int matrix, Shared* shared) const {
    const Real* g = job.g + job.at(matrix, column);
    const Real square = sum(team, job.n, shared->parts, [=](int i) { return g[i] * g[i]; });
    Real* norm = job.norms + std::int64_t{matrix} * job.n + column;
    team.each(1, [=](int) { *norm = std::sqrt(square); });
  }
};

// What a matrix begins with: a team for each.
template <class Real>
struct Begin {
  Jacobi<Real> job;
  struct Shared {};

  template <class Team>
  RLSPEC_BOTH void operator()(const Team& team, int, int matrix, Shared*) const {
    const Jacobi<Real> job = this->job;
    team.each(1, [=](int) {
      Real longest = 0;
      for (int i = 0; i < job.n; ++i) longest = worse(longest, job.norms[std::int64_t{matrix} * job.n + i]);
      job.least[matrix] = longest * job.tolerance();
      job.status[matrix] = longest <= kLargest<Real> ? kRunning : kNotFinite;
      job.sweeps[matrix] = 0;
    });
  }
};

// One round of a sweep: a team for each pair of blocks.
template <class Real>
struct Round {
  Jacobi<Real> job;
  int round;
  using Shared = Window<Real>;

  template <class Team>
  RLSPEC_BOTH void operator()(const Team& team, int table, int matrix, Shared* shared) const {
    if (job.status[matrix] != kRunning) return;
    const Pair blocks = game(job.blocks(), round, table);
    Real* g = job.g + job.at(matrix, 0);
    multiply_columns(team, blocks, g, shared);
    look(team, table, matrix, shared);
    if (shared->off <= job.tolerance()) return;
    sweep_window(team, job.tolerance(), shared);
    make_orthogonal(team, shared);
    turn_columns(team, blocks, g, shared);
    if (job.v != nullptr) turn_columns(team, blocks, job.v + job.at(matrix, 0), shared);
  }

 private:
  // Column c of the window.
  static RLSPEC_BOTH int column(Pair blocks, int c) {
    return c < kBlock ? blocks.first * kBlock + c : blocks.second * kBlock + c - kBlock;
  }

  // Rows [start, start + kWindow) of the window's columns; what is past the matrix is zero.
  template <class Team>
  RLSPEC_BOTH void load(const Team& team, Pair blocks, const Real* columns, int start, Shared* w) const {
    const int n = job.n;
    team.each(kWindow * kWindow, [=](int item) {
      const int c = item / kWindow, r = item % kWindow, j = column(blocks, c);
      w->tile[c * kStride + r] =
          j < n && start + r < n ? columns[static_cast<std::int64_t>(j) * n + start + r] : Real(0);
    });
  }

  template <class Team>
  RLSPEC_BOTH void multiply_columns(const Team& team, Pair blocks, const Real* g, Shared* w) const {
    team.each(kWindow * kWindow, [=](int item) {
      const int i = item / kWindow, j = item % kWindow;
      w->gram[i * kStride + j] = 0;
      w->turn[i * kStride + j] = i == j ? Real(1) : Real(0);
    });
    for (int start = 0; start < job.n; start += kWindow) {
      load(team, blocks, g, start, w);
      // A lane sums up 4 x 2 entries.
      team.each(kLanes, [=](int lane) {
        const Real* a = w->tile + lane / 16 * kStride;
        const Real* b = w->tile + lane % 16 * kStride;
        Real* out = w->gram + lane / 16 * kStride + lane % 16;
        Real sums[4][2];
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 2; ++j) sums[i][j] = out[8 * i * kStride + 16 * j];
        }
        for (int r = 0; r < kWindow; ++r) {
          for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 2; ++j) sums[i][j] += a[8 * i * kStride + r] * b[16 * j * kStride + r];
          }
        }
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 2; ++j) out[8 * i * kStride + 16 * j] = sums[i][j];
        }
      });
    }
  }

  // How far the columns are from orthogonal, of this window and of this sweep at the table.
  template <class Team>
  RLSPEC_BOTH void look(const Team& team, int table, int matrix, Shared* w) const {
    const Real least = job.least[matrix];
    team.each(kWindow, [=](int i) {
      const Real mine = std::sqrt(w->gram[i * kStride + i]);
      Real off = 0;
      for (int j = 0; j < i; ++j) {
        const Real other = std::sqrt(w->gram[j * kStride + j]);
        const bool rounding = mine <= least || other <= least;
        off = worse(off, rounding ? Real(0) : std::abs(w->gram[i * kStride + j]) / (mine * other));
      }
      w->parts[i] = off;
    });
    Real* cosine = job.cosines + std::int64_t{matrix} * job.games() + table;
    const bool first = round == 0;
    team.each(1, [=](int) {
      Real off = 0;
      for (int i = 0; i < kWindow; ++i) off = worse(off, w->parts[i]);
      w->off = off;
      *cosine = first ? off : worse(*cosine, off);
    });
  }

  template <class Team>
  RLSPEC_BOTH void turn_columns(const Team& team, Pair blocks, Real* columns, Shared* w) const {
    const int n = job.n;
    for (int start = 0; start < n; start += kWindow) {
      load(team, blocks, columns, start, w);
      // A lane makes 8 entries of a row.
      team.each(kLanes, [=](int lane) {
        const int r = lane % kWindow, first = lane / kWindow * 8;
        Real sums[8] = {};
        for (int k = 0; k < kWindow; ++k) {
          const Real entry = w->tile[k * kStride + r];
          for (int c = 0; c < 8; ++c) sums[c] += entry * w->turn[k * kStride + first + c];
        }
        if (start + r >= n) return;
        for (int c = 0; c < 8; ++c) {
          const int j = column(blocks, first + c);
          if (j < n) columns[static_cast<std::int64_t>(j) * n + start + r] = sums[c];
        }
      });
    }
  }
};

// The end of a sweep: a team for each matrix.
template <class Real>
struct Judge {
  Jacobi<Real> job;
  struct Shared {};

  template <class Team>
  RLSPEC_BOTH void operator()(const Team& team, int, int matrix, Shared*) const {
    const Jacobi<Real> job = this->job;
    team.each(1, [=](int) {
      if (job.status[matrix] != kRunning) return;
      Real off = 0;
      for (int i = 0; i < job.games(); ++i) off = worse(off, job.cosines[std::int64_t{matrix} * job.games() + i]);
      ++job.sweeps[matrix];
      if (off <= job.tolerance()) job.status[matrix] = kConverged;
    });
  }
};

// A column goes to its place by descending length, and there it has length 1: a team for each.
template <class Real>
struct Place {
  Jacobi<Real> job;
  struct Shared {
    int parts[kLanes];
  };

  template <class Team>
  RLSPEC_BOTH void operator()(const Team& team, int column, int matrix, Shared* shared) const {
    const Jacobi<Real> job = this->job;
    const Real* norms = job.norms + std::int64_t{matrix} * job.n;
    const Real norm = norms[column];
    const int place = sum(team, job.n, shared->parts, [=](int i) {
      return static_cast<int>(norms[i] > norm || (norms[i] == norm && i < column));
    });
    const std::int64_t from = job.at(matrix, column), to = job.at(matrix, place);
    team.each(job.n, [=](int i) {
      if (i == 0) job.values[std::int64_t{matrix} * job.n + place] = norm;
      job.left[to + i] = norm > job.least[matrix] ? job.g[from + i] / norm : Real(0);
      if (job.right != nullptr) job.right[to + i] = job.v[from + i];
    });
  }
};

// Left vectors of values that are rounding, which A does not determine: any that make U orthogonal. Each is the unit
// vector that the others hold least of, orthogonalised twice. Few have any to do, and it is slow. A team for each
// matrix.
template <class Real>
struct Complete {
  Jacobi<Real> job;
  struct Shared {
    Real parts[kLanes];
    int unit;
  };

  template <class Team>
  RLSPEC_BOTH void operator()(const Team& team, int, int matrix, Shared* shared) const {
    const Jacobi<Real> job = this->job;
    if (job.status[matrix] != kConverged) return;
    const int n = job.n;
    const Real* values = job.values + std::int64_t{matrix} * n;
    Real* u = job.left + job.at(matrix, 0);
    Real* held = job.norms + std::int64_t{matrix} * n;
    for (int k = 0; k < n; ++k) {
      if (values[k] > job.least[matrix]) continue;
      team.each(n, [=](int i) {
        held[i] = 0;
        for (int j = 0; j < k; ++j) held[i] += u[std::int64_t{j} * n + i] * u[std::int64_t{j} * n + i];
      });
      team.each(1, [=](int) {
        shared->unit = 0;
        for (int i = 1; i < n; ++i) shared->unit = held[i] < held[shared->unit] ? i : shared->unit;
      });
      Real* mine = u + std::int64_t{k} * n;
      team.each(n, [=](int i) { mine[i] = i == shared->unit ? Real(1) : Real(0); });
      for (int pass = 0; pass < 2; ++pass) {
        team.each(k, [=](int j) {
          held[j] = 0;
          for (int i = 0; i < n; ++i) held[j] += u[std::int64_t{j} * n + i] * mine[i];
        });
        team.each(n, [=](int i) {
          for (int j = 0; j < k; ++j) mine[i] -= held[j] * u[std::int64_t{j} * n + i];
        });
      }
      const Real square = sum(team, n, shared->parts, [=](int i) { return mine[i] * mine[i]; });
      const Real norm = std::sqrt(square);
      team.each(n, [=](int i) { mine[i] /= norm; });
    }
  }
};

// The whole of it. `launch(teams, batch, step)` has `step` done by so many teams for each matrix, one launch after the
// other. A matrix that is done costs each further launch a look at its status; the host waits for nothing.
template <class Real, class Launch>
void solve(const Jacobi<Real>& job, Launch launch) {
  if (job.batch == 0 || job.n == 0) return;
  launch(job.n, job.batch, MeasureColumns<Real>{job});
  launch(1, job.batch, Begin<Real>{job});
  for (int sweep = 0; sweep < job.most_sweeps; ++sweep) {
    for (int round = 0; round < job.blocks() - 1; ++round) launch(job.games(), job.batch, Round<Real>{job, round});
    launch(1, job.batch, Judge<Real>{job});
  }
  launch(job.n, job.batch, MeasureColumns<Real>{job});
  launch(job.n, job.batch, Place<Real>{job});
  launch(1, job.batch, Complete<Real>{job});
}

}  // namespace rlspec
