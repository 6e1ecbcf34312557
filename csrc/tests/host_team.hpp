// The device's solver on the host, with lanes and teams in any order: what depended on an order would show.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/jacobi.hpp"

namespace rlspec {

// Items in the order of their numbers, or in a new random one at each call.
class Order {
 public:
  explicit Order(unsigned seed) : shuffled_(seed != 0), random_(seed) {}

  template <class Item>
  void each(int count, Item item) {
    if (!shuffled_) {
      for (int i = 0; i < count; ++i) item(i);
      return;
    }
    std::vector<int> numbers(static_cast<std::size_t>(count));
    std::iota(numbers.begin(), numbers.end(), 0);
    std::shuffle(numbers.begin(), numbers.end(), random_);
    for (const int i : numbers) item(i);
  }

 private:
  bool shuffled_;
  std::mt19937 random_;
};

class HostTeam {
 public:
  explicit HostTeam(Order* order) : order_(order) {}

  template <class Item>
  void each(int count, Item item) const {
    order_->each(count, item);
  }

 private:
  Order* order_;
};

// `seed`: 0 for the plain order.
template <class Real>
void solve_on_host(const Jacobi<Real>& job, unsigned seed) {
  Order teams_order(seed), lanes_order(seed);
  const HostTeam team(&lanes_order);
  solve(job, [&](int teams, int batch, auto step) {
    teams_order.each(teams * batch, [&](int item) {
      // Shared memory holds what another team left there.
      const auto shared = std::make_unique<typename decltype(step)::Shared>();
      unsigned char* bytes = reinterpret_cast<unsigned char*>(shared.get());
      std::fill(bytes, bytes + sizeof(*shared), static_cast<unsigned char>(0xff));
      step(team, item % teams, item / teams, shared.get());
    });
  });
}

}  // namespace rlspec
